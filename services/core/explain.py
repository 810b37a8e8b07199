"""From the codes of the kernels to a `Constraint` with its numbers."""

from collections.abc import Sequence

from services.core.constraint import FITS, Constraint, ConstraintKind
from services.core.feasibility import MISS_BLOCKS, MISS_SEATS
from services.core.selection import HOPELESS, Causes
from services.core.simulate import FEASIBLE, MISS_DEADLINE, MISS_TPOT
from services.core.view import Prefill

__all__ = ["Cause", "constraint_of", "found_causes"]


Cause = tuple[int, int, float, float]
"""One row of `Causes` in Python's numbers: code, whose deadline or tier, needed, available."""


def found_causes(causes: Causes) -> list[Cause]:
    """The rows of `causes`, read once: one number of an array at a time takes longer than the whole decision."""
    columns = (causes.code.tolist(), causes.row.tolist(), causes.needed.tolist(), causes.available.tolist())
    return list(zip(*columns, strict=True))


def constraint_of(start_s: float, items: Sequence[Prefill], cause: Cause, row: int) -> Constraint:
    """Why item `row` was left out of a plan that starts at `start_s`; FITS if it was not."""
    code, whose, needed, available = cause
    if code == FEASIBLE:
        return FITS
    if code == MISS_DEADLINE:
        late = items[whose]
        return Constraint(
            ConstraintKind.PREFILL_BUDGET, needed, available, "tokens", start_s, late.deadline_s, late.tier, late.id
        )
    if code == MISS_TPOT:
        return Constraint(ConstraintKind.TPOT, needed, available, "s", tier=whose)
    if code == MISS_BLOCKS:
        return Constraint(ConstraintKind.KV_BLOCKS, needed, available, "blocks")
    if code == MISS_SEATS:
        return Constraint(ConstraintKind.MAX_SEQS, needed, available, "requests")
    if code == HOPELESS:
        item = items[row]
        return Constraint(ConstraintKind.HOPELESS, needed, available, "s", start_s, item.deadline_s, item.tier, item.id)
    raise AssertionError(f"unknown code {code} from the kernels")
