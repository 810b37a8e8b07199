"""One admission problem solved greedily or by Moore-Hodgson, over all duration caps, in one compiled call.

The dynamic program builds on that answer in `services.core.dp_solver`, so that nothing of it is compiled unless used.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.core.columns import Floats, Ints
from services.core.compiled import compiled
from services.core.feasibility import behind, check, settle
from services.core.fluid import fluid_of
from services.core.memory import with_peak
from services.core.problem import Problem
from services.core.selection import Causes, Selection, fill_in, moore_hodgson, refused, screen
from services.core.simulate import AFTER, FEASIBLE, LEFT_OUT, simulate

__all__ = ["GREEDY", "MH", "Bools", "Solution", "cheapest_first", "finished", "heavier", "solve"]

GREEDY, MH = 0, 1

SMALL = 12
"""With at most so many candidates Moore-Hodgson also tries greedy, which now and then keeps more; it is cheap then."""

FILL_HOPE = 2
"""Weight that filling in is expected to regain at most; used to give up on a cap early."""

Bools = NDArray[np.bool_]


class Solution(NamedTuple):
    """Who is kept, under which cap, why the others are not, and when everything would finish.

    What is left out finishes after everything kept, in deadline order. `batch_s` is the mean batch of the plan.
    """

    standing: Ints
    causes: Causes
    weight: int
    cap_s: float
    base_feasible: bool
    finish_s: Floats
    batch_s: float


@compiled
def cheapest_first(problem: Problem) -> Ints:
    """Rows by prefill left per unit of weight: the order to fill in."""
    return np.argsort(problem.queue.remaining / problem.queue.weight)


@compiled
def heavier(a: Selection, b: Selection) -> Selection:
    """The selection of more weight, the first of equal ones."""
    chosen = b if b.weight > a.weight else a
    return Selection(chosen.standing, chosen.causes, chosen.weight, a.capped or b.capped)


@compiled
def solve(
    problem: Problem,
    policy: int,
    caps_s: Floats,
    order: Ints,
    hopeless_margin_s: float,
) -> Solution:
    """Keep as much weight as the policy can; the first cap that keeps everything wins, else the one that keeps most.

    `order` is the order of arrival, for greedy. A cap under which a promise is missed loses against one that keeps
    them all.
    """
    problem = with_peak(problem)
    queue = problem.queue
    m = queue.deadline.shape[0]
    hopeful, causes = screen(problem, ~queue.promised, hopeless_margin_s)
    total = 0
    for j in range(m):
        if hopeful[j]:
            total += queue.weight[j]
    small = np.count_nonzero(hopeful) <= SMALL
    best = Selection(np.zeros(m, np.int64), causes, -1, True)
    best_cap = caps_s[0]
    best_fine = False
    best_behind = np.inf
    for i in range(caps_s.shape[0]):
        standing = queue.promised.astype(np.int64)
        late_by_s = np.full(m, np.inf)
        fine = settle(problem, standing, caps_s[i], late_by_s)
        if best_fine and not fine:
            continue
        fluid = fluid_of(problem, caps_s[i], np.empty(0), 1)
        nothing = Selection(standing, causes, 0, False)
        alone = check(fluid, False, standing, late_by_s)
        if alone.code != FEASIBLE:
            # What runs is already too much: any candidate would make it worse.
            kept = refused(nothing, hopeful, alone)
        elif policy == GREEDY:
            kept = fill_in(fluid, False, nothing, hopeful, late_by_s, order)
        else:
            # A cap that keeps less than the best one did needs no finishing touches.
            give_up = best.weight + 1 - FILL_HOPE if fine == best_fine and not small else 0
            kept = moore_hodgson(fluid, False, standing, hopeful, causes, late_by_s, give_up)
            if give_up <= kept.weight < total:
                kept = fill_in(fluid, False, kept, hopeful, late_by_s, cheapest_first(problem))
                if 0 < kept.weight < total and small:  # of nothing kept, no candidate fits even by itself
                    kept = heavier(kept, fill_in(fluid, False, nothing, hopeful, late_by_s, order))
        if (fine and not best_fine) or kept.weight > best.weight:
            best, best_cap, best_fine = kept, caps_s[i], fine
            best_behind = behind(standing, late_by_s)
        if (best_fine and best.weight >= total) or (fine and not kept.capped and not alone.capped):
            break
    return finished(problem, best, best_cap, best_fine, best_behind)


@compiled
def finished(problem: Problem, kept: Selection, cap_s: float, base_feasible: bool, behind_s: float) -> Solution:
    """The solution that keeps `kept`: simulate it once more, with what is left out behind everything."""
    standing = kept.standing.copy()
    planned = simulate(problem, standing, cap_s, behind_s)
    batch_s = (planned.end_s - problem.start_s) / max(1, planned.batches)
    finish = planned.finish_s
    left_out = 0
    for j in range(standing.shape[0]):
        if standing[j] == LEFT_OUT:
            standing[j] = AFTER
            left_out += 1
    if left_out > 0:
        finish = simulate(problem, standing, cap_s, behind_s).finish_s
    return Solution(kept.standing, kept.causes, kept.weight, cap_s, base_feasible, finish, batch_s)
