"""The one feasibility test: does a set of prefills fit, together with everything that runs?

Four questions in the order of their cost: seats, the simulated plan (deadlines and TPOT), KV blocks, TPOT of the
decode that follows. Moore-Hodgson, greedy and the final check of every policy all ask it.
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Floats, Ints
from services.core.compiled import compiled
from services.core.memory import forecast
from services.core.problem import EPS_S, Problem
from services.core.simulate import FEASIBLE, IN_TIME, LATE, MISS_DEADLINE, MISS_TPOT, simulate

__all__ = ["MISS_BLOCKS", "MISS_SEATS", "Verdict", "check", "settle"]

MISS_BLOCKS, MISS_SEATS = 3, 4


class Verdict(NamedTuple):
    """What is missed first (`code`, FEASIBLE for nothing), whose it is, and the numbers."""

    code: int
    row: int
    needed: float
    available: float
    end_s: float
    batches: int
    finish_s: Floats


@compiled
def check(problem: Problem, standing: Ints, cap_s: float, late_by_s: Floats) -> Verdict:
    """Test the prefills that have a standing. `late_by_s` is when each LATE prefill may finish at the latest."""
    seats = problem.base.steps.shape[0] + np.count_nonzero(standing)
    outcome = simulate(problem, standing, cap_s)
    code, row, needed, available = outcome.code, outcome.row, outcome.needed, outcome.available
    if seats > problem.limits.seats:
        code, row, needed, available = MISS_SEATS, -1, float(seats), float(problem.limits.seats)
    if code == FEASIBLE:
        for j in range(standing.shape[0]):
            if standing[j] == LATE and outcome.finish_s[j] > late_by_s[j] + EPS_S:
                code, row = MISS_DEADLINE, j
                needed, available = float(problem.queue.remaining[j]), 0.0
                break
    if code == FEASIBLE:
        ahead = forecast(problem, standing, outcome.joined)
        if ahead.peak_blocks > problem.limits.blocks:
            code, row = MISS_BLOCKS, ahead.peak_step
            needed, available = float(ahead.peak_blocks), float(problem.limits.blocks)
        elif ahead.excess_s > EPS_S:
            code, row = MISS_TPOT, ahead.excess_tier
            needed, available = ahead.batch_s, ahead.batch_s - ahead.excess_s
    return Verdict(code, row, needed, available, outcome.end_s, outcome.batches, outcome.finish_s)


@compiled
def settle(problem: Problem, standing: Ints, cap_s: float, late_by_s: Floats) -> bool:
    """Give promised prefills that will be late anyway their standing, and a new time they must not be delayed beyond.

    True if nothing promised is missed. What is late already does not count against candidates, but no candidate may
    make it later.
    """
    fine = True
    outcome = simulate(problem, standing, cap_s)
    while outcome.code == MISS_DEADLINE and standing[outcome.row] == IN_TIME:
        standing[outcome.row] = LATE
        fine = False
        outcome = simulate(problem, standing, cap_s)
    for j in range(standing.shape[0]):
        if standing[j] == LATE:
            late_by_s[j] = outcome.finish_s[j]
    return fine and outcome.code == FEASIBLE
