"""From the codes of the kernels to a `Constraint` with its numbers."""

from collections.abc import Sequence

from services.core.constraint import FITS, Constraint, ConstraintKind
from services.core.feasibility import MISS_BLOCKS, MISS_SEATS
from services.core.problem import Problem
from services.core.selection import HOPELESS, Causes
from services.core.simulate import FEASIBLE, MISS_DEADLINE, MISS_TPOT
from services.core.view import Prefill, ReplicaView

__all__ = ["constraint_of"]


def constraint_of(
    view: ReplicaView, problem: Problem, items: Sequence[Prefill], causes: Causes, row: int
) -> Constraint:
    """Why item `row` was left out; FITS if it was not."""
    code = int(causes.code[row])
    if code == FEASIBLE:
        return FITS
    needed, available, whose = float(causes.needed[row]), float(causes.available[row]), int(causes.row[row])
    start_s = view.start_s
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
    raise AssertionError(f"unknown code {code} from the kernels, {problem.limits}")
