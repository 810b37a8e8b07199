"""What comes with a call besides its message."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Arrival"]

_NO_DEADLINE_S = 10 * 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came with a call besides its message. `remaining_s`: what the client's deadline leaves."""

    metadata: Iterable[tuple[str, str | bytes]]
    remaining_s: float | None
    at_us: int

    @property
    def deadline_us(self) -> int:
        """The client's deadline, 0 where it has none."""
        if self.remaining_s is None or self.remaining_s > _NO_DEADLINE_S:
            return 0
        return self.at_us + round(self.remaining_s * 1e6)
