"""Why a request cannot be promised: the binding constraint with its numbers."""

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["FITS", "Constraint", "ConstraintKind"]


class ConstraintKind(StrEnum):
    """What runs out first. NONE: it fits."""

    NONE = "none"
    KV_BLOCKS = "kv_blocks"
    PREFILL_BUDGET = "prefill_budget"
    TPOT = "tpot"
    HOPELESS = "hopeless"
    MAX_SEQS = "max_seqs"


@dataclass(frozen=True, slots=True)
class Constraint:
    """The binding constraint of a decision.

    `needed` and `available` are in `unit` ("blocks", "tokens", "s", "requests"). The window is monotonic seconds, from
    now to the deadline it binds at; NaN where the constraint has none. `tier` is the TPOT tier concerned, -1 if none.
    """

    kind: ConstraintKind
    needed: float = 0.0
    available: float = 0.0
    unit: str = ""
    window_start_s: float = math.nan
    window_end_s: float = math.nan
    tier: int = -1
    request_id: str = ""

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        need, have = _amount(self.needed, self.unit), _amount(self.available, self.unit)
        window_ms = (self.window_end_s - self.window_start_s) * 1e3
        match self.kind:
            case ConstraintKind.NONE:
                return "fits"
            case ConstraintKind.KV_BLOCKS:
                return f"KV memory: the forecast peaks at {need}, the replica has {have}"
            case ConstraintKind.PREFILL_BUDGET:
                return f"prefill budget: {need} wanted in the next {window_ms:.0f} ms, {have} left"
            case ConstraintKind.TPOT:
                return f"TPOT of tier {self.tier}: a batch would last {need}, the tier allows {have}"
            case ConstraintKind.HOPELESS:
                return f"hopeless: even alone the first token takes {need}, its deadline leaves {have}"
            case ConstraintKind.MAX_SEQS:
                return f"concurrency: {need} wanted, the engine runs {have}"


FITS = Constraint(ConstraintKind.NONE)


def _amount(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.1f} ms"
    return f"{value:.0f} {unit}".strip()
