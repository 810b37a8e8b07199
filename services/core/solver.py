"""One admission problem solved under one of the three policies, over all duration caps, in one compiled call."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.core.columns import Floats, Ints
from services.core.compiled import compiled
from services.core.dp import optimum
from services.core.feasibility import settle
from services.core.fluid import fluid_of
from services.core.problem import Problem
from services.core.selection import Causes, Selection, fill_in, greedy, moore_hodgson, screen
from services.core.simulate import AFTER, LEFT_OUT, simulate

__all__ = ["DP", "GREEDY", "MH", "Solution", "solve"]

GREEDY, MH, DP = 0, 1, 2

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
def _cheapest_first(problem: Problem) -> Ints:
    return np.argsort(problem.queue.remaining / problem.queue.weight)


@compiled
def _heavier(a: Selection, b: Selection) -> Selection:
    return b if b.weight > a.weight else a


@compiled
def _solve_at(
    problem: Problem,
    policy: int,
    cap_s: float,
    standing: Ints,
    hopeful: Bools,
    causes: Causes,
    late_by_s: Floats,
    order: Ints,
    acceptance: Floats,
    max_verify: int,
    total: int,
    enough: int,
) -> Selection:
    """What the policy keeps under one cap; `enough` is the weight below which the answer does not matter."""
    fluid = fluid_of(problem, cap_s, acceptance, max_verify)
    if policy == GREEDY:
        return greedy(fluid, False, standing, hopeful, causes, late_by_s, order)
    small = np.count_nonzero(hopeful) <= SMALL
    kept = moore_hodgson(fluid, False, standing, hopeful, causes, late_by_s, 0 if small else enough - FILL_HOPE)
    if kept.weight >= total or (kept.weight < enough - FILL_HOPE and not small):
        return kept
    cheapest = _cheapest_first(problem)
    kept = fill_in(fluid, False, kept, hopeful, late_by_s, cheapest)
    if kept.weight < total and (small or policy == DP):
        kept = _heavier(kept, greedy(fluid, False, standing, hopeful, causes, late_by_s, order))
    if policy == DP and kept.weight < total:
        stated = moore_hodgson(fluid, True, standing, hopeful, causes, late_by_s, 0)
        best = optimum(fluid, standing, hopeful, stated.weight)
        chosen = best.standing if best.weight >= 0 else stated.standing
        repaired = moore_hodgson(fluid, False, standing, hopeful & (chosen != LEFT_OUT), causes, late_by_s, 0)
        kept = _heavier(kept, fill_in(fluid, False, repaired, hopeful, late_by_s, cheapest))
    return kept


@compiled
def solve(
    problem: Problem,
    policy: int,
    caps_s: Floats,
    order: Ints,
    hopeless_margin_s: float,
    acceptance: Floats,
    max_verify: int,
) -> Solution:
    """Keep as much weight as the policy can; the first cap that keeps everything wins, else the one that keeps most.

    `order` is the order of arrival, for greedy. A cap under which a promise is missed loses against one that keeps
    them all.
    """
    queue = problem.queue
    m = queue.deadline.shape[0]
    hopeful, causes = screen(problem, ~queue.promised, hopeless_margin_s)
    total = 0
    for j in range(m):
        if hopeful[j]:
            total += queue.weight[j]
    best = Selection(np.zeros(m, np.int64), causes, -1)
    best_cap = caps_s[0]
    best_fine = False
    for i in range(caps_s.shape[0]):
        standing = queue.promised.astype(np.int64)
        late_by_s = np.full(m, np.inf)
        fine = settle(problem, standing, caps_s[i], late_by_s)
        if best_fine and not fine:
            continue
        enough = best.weight + 1 if fine == best_fine and policy != DP else 0
        kept = _solve_at(
            problem,
            policy,
            caps_s[i],
            standing,
            hopeful,
            causes,
            late_by_s,
            order,
            acceptance,
            max_verify,
            total,
            enough,
        )
        if (fine and not best_fine) or kept.weight > best.weight:
            best, best_cap, best_fine = kept, caps_s[i], fine
        if best_fine and best.weight >= total:
            break
    standing = best.standing.copy()
    planned = simulate(problem, standing, best_cap)
    batch_s = (planned.end_s - problem.start_s) / max(1, planned.batches)
    finish = planned.finish_s
    left_out = 0
    for j in range(m):
        if standing[j] == LEFT_OUT:
            standing[j] = AFTER
            left_out += 1
    if left_out > 0:
        finish = simulate(problem, standing, best_cap).finish_s
    return Solution(best.standing, best.causes, best.weight, best_cap, best_fine, finish, batch_s)
