"""Admission by the dynamic program: the exact answer of the stated model, made good on the simulated plan.

The program of `services.core.dp` finds the heaviest set in the stated model, where batches are melted into a rate. The
simulated plan is stricter here and more generous there, so its set is repaired by Moore-Hodgson and filled in over the
simulated plan, and the heaviest of that, of Moore-Hodgson's own answer and of greedy's is kept. `dp` therefore never
keeps less than `mh`, and whatever it keeps has passed the same test.
"""

import numpy as np

from services.core.columns import Floats, Ints
from services.core.compiled import compiled
from services.core.dp import optimum
from services.core.feasibility import behind, settle
from services.core.fluid import fluid_of
from services.core.problem import Problem
from services.core.selection import Causes, Selection, fill_in, moore_hodgson, screen
from services.core.simulate import LEFT_OUT
from services.core.solver import MH, Bools, Solution, cheapest_first, finished, heavier, solve

__all__ = ["solve_exactly"]


def solve_exactly(
    problem: Problem, caps_s: Floats, order: Ints, hopeless_margin_s: float, acceptance: Floats, max_verify: int
) -> Solution:
    """Like `solver.solve`, by the dynamic program; draft lengths are its to choose where `acceptance` is given."""
    known = solve(problem, MH, caps_s, order, hopeless_margin_s)
    queue = problem.queue
    hopeful, causes = screen(problem, ~queue.promised, hopeless_margin_s)
    total = int(queue.weight[hopeful].sum())
    for cap_s in caps_s:
        if known.weight >= total:
            break
        standing = queue.promised.astype(np.int64)
        late_by_s = np.full(len(standing), np.inf)
        if settle(problem, standing, cap_s, late_by_s) == known.base_feasible:
            kept = _improved(
                problem, cap_s, standing, hopeful, causes, late_by_s, order, acceptance, max_verify, known.weight
            )
            if kept.weight > known.weight:
                known = finished(problem, kept, cap_s, known.base_feasible, behind(standing, late_by_s))
            if known.base_feasible and not kept.capped:
                break
    return known


@compiled
def _improved(
    problem: Problem,
    cap_s: float,
    standing: Ints,
    hopeful: Bools,
    causes: Causes,
    late_by_s: Floats,
    order: Ints,
    acceptance: Floats,
    max_verify: int,
    known_weight: int,
) -> Selection:
    """The heaviest that greedy or the repaired optimum keep under one cap."""
    fluid = fluid_of(problem, cap_s, acceptance, max_verify)
    anything = known_weight - known_weight
    cheapest = cheapest_first(problem)
    stated = moore_hodgson(fluid, True, standing, hopeful, causes, late_by_s, anything)
    stated = fill_in(fluid, True, stated, hopeful, late_by_s, cheapest)
    best = optimum(fluid, standing, hopeful, stated.weight)
    chosen = best.standing if best.weight >= 0 else stated.standing
    repaired = moore_hodgson(fluid, False, standing, hopeful & (chosen != LEFT_OUT), causes, late_by_s, anything)
    filled = fill_in(fluid, False, repaired, hopeful, late_by_s, cheapest)
    greedy = fill_in(fluid, False, Selection(standing, causes, 0, False), hopeful, late_by_s, order)
    return heavier(filled, greedy)
