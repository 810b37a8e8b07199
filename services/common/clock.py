"""One anchor between wall clock and monotonic clock per process.

On the wire times are Unix microseconds; inside a process everything is scheduled on the monotonic clock, so a stepped
wall clock moves no deadline. The anchor is taken once; tests build a `Clock` with sources of their own.
"""

import time
from collections.abc import Callable

__all__ = ["Clock"]


class Clock:
    """Converts between Unix microseconds and monotonic seconds with one fixed anchor."""

    def __init__(
        self,
        monotonic_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic_s = monotonic_s
        self._offset_s = wall_s() - monotonic_s()

    def now_s(self) -> float:
        """Monotonic seconds, the clock everything is scheduled on."""
        return self._monotonic_s()

    def now_us(self) -> int:
        """Unix microseconds: the anchor plus elapsed monotonic time."""
        return self.to_unix_us(self._monotonic_s())

    def to_unix_us(self, monotonic_s: float) -> int:
        """Unix microseconds of a monotonic time in seconds."""
        return round((monotonic_s + self._offset_s) * 1e6)

    def to_monotonic_s(self, unix_us: int) -> float:
        """Monotonic seconds of a Unix time in microseconds."""
        return unix_us / 1e6 - self._offset_s
