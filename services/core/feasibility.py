"""The one feasibility test: does a set of prefills fit, together with everything that runs?

Four questions in the order of their cost: seats, the simulated plan (deadlines and TPOT), KV blocks, TPOT of the
decode that follows. Moore-Hodgson, greedy and the final check of every policy all ask it.
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Floats, Ints
from services.core.compiled import compiled
from services.core.fluid import Fluid, first_miss
from services.core.memory import forecast, surely_fits
from services.core.problem import EPS_S, Problem
from services.core.simulate import FEASIBLE, IN_TIME, LATE, MISS_DEADLINE, MISS_TPOT, simulate

__all__ = ["MISS_BLOCKS", "MISS_SEATS", "Feasibility", "behind", "check", "settle"]

MISS_BLOCKS, MISS_SEATS = 3, 4


class Feasibility(NamedTuple):
    """What is missed first (`code`, FEASIBLE for nothing), whose it is, and the numbers."""

    code: int
    row: int
    needed: float
    available: float
    end_s: float
    capped: bool
    finish_s: Floats


@compiled
def behind(standing: Ints, late_by_s: Floats) -> float:
    """When the last late promise is due to be through; inf if none is late."""
    last = -np.inf
    for j in range(standing.shape[0]):
        if standing[j] == LATE:
            last = max(last, late_by_s[j])
    return last if last > -np.inf else np.inf


@compiled
def _delays_late_ones(problem: Problem, standing: Ints, cap_s: float, late_by_s: Floats, finish_s: Floats) -> int:
    """The first late promise that would be through later than without candidates; -1 if none.

    Candidates served behind late promises may share, and so lengthen, their last batch; those in front may not.
    """
    last = behind(standing, late_by_s)
    grace = cap_s
    for j in range(standing.shape[0]):
        if standing[j] == IN_TIME and not problem.queue.promised[j] and problem.queue.deadline[j] <= last:
            grace = EPS_S
    for j in range(standing.shape[0]):
        if standing[j] == LATE and finish_s[j] > late_by_s[j] + grace:
            return j
    return -1


@compiled
def check(fluid: Fluid, stated: bool, standing: Ints, late_by_s: Floats) -> Feasibility:
    """Test the prefills that have a standing, over the simulated plan or (`stated`) over the stated model.

    `late_by_s` is when each late promise would be through without candidates.
    """
    if stated:
        row, blocks, end = first_miss(fluid, standing)
        code = FEASIBLE if row < 0 else (MISS_BLOCKS if blocks else MISS_DEADLINE)
        return Feasibility(code, row, 0.0, 0.0, end, True, np.empty(0))
    problem, cap_s = fluid.problem, fluid.cap_s
    seats = problem.base.steps.shape[0] + np.count_nonzero(standing)
    outcome = simulate(problem, standing, cap_s, behind(standing, late_by_s))
    code, row, needed, available = outcome.code, outcome.row, outcome.needed, outcome.available
    if seats > problem.limits.seats:
        code, row, needed, available = MISS_SEATS, -1, float(seats), float(problem.limits.seats)
    if code == FEASIBLE:
        j = _delays_late_ones(problem, standing, cap_s, late_by_s, outcome.finish_s)
        if j >= 0:
            code, row, needed, available = MISS_DEADLINE, j, float(problem.queue.remaining[j]), 0.0
    if code == FEASIBLE and not surely_fits(problem, standing):
        ahead = forecast(problem, standing, outcome.began, outcome.joined)
        if ahead.peak_blocks > problem.limits.blocks:
            code, row = MISS_BLOCKS, ahead.peak_step
            needed, available = float(ahead.peak_blocks), float(problem.limits.blocks)
        elif ahead.excess_s > EPS_S:
            code, row = MISS_TPOT, ahead.excess_tier
            needed, available = ahead.batch_s, ahead.batch_s - ahead.excess_s
    return Feasibility(code, row, needed, available, outcome.end_s, outcome.capped, outcome.finish_s)


@compiled
def settle(problem: Problem, standing: Ints, cap_s: float, late_by_s: Floats) -> bool:
    """Give promised prefills that will be late anyway their standing, and a new time they must not be delayed beyond.

    True if nothing promised is missed. What is late already does not count against candidates, but no candidate may
    make it later.
    """
    fine = True
    outcome = simulate(problem, standing, cap_s, np.inf)
    while outcome.code == MISS_DEADLINE and standing[outcome.row] == IN_TIME:
        standing[outcome.row] = LATE
        fine = False
        outcome = simulate(problem, standing, cap_s, np.inf)
    for j in range(standing.shape[0]):
        if standing[j] == LATE:
            late_by_s[j] = outcome.finish_s[j]
    return fine and outcome.code == FEASIBLE
