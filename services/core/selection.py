"""Greedy and Moore-Hodgson: which of the asked prefills to keep when not all fit.

Moore and Hodgson (Management Science 1968) minimise the number of late jobs on one machine: serve in deadline order
and, at the first job that is late, drop the longest job so far. Here "late" is the first problem of the feasibility
test, promised requests cannot be dropped, and the length is prefill left per unit of weight. A dropped request is
dropped *for now*: at the next batch boundary it is asked about again, until it is hopeless.

Both run over the simulated plan, or (`stated`) over the stated model of `services.core.fluid`, where their answers are
compared with the exact program of `services.core.dp`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.core.columns import Floats, Ints
from services.core.compiled import compiled, seconds
from services.core.feasibility import MISS_BLOCKS, Feasibility, check
from services.core.fluid import Fluid
from services.core.memory import forecast, memory_surely_fits
from services.core.prefill_work import work
from services.core.problem import EPS_S, Problem
from services.core.simulate import FEASIBLE, IN_TIME, LATE, LEFT_OUT, MISS_DEADLINE, MISS_TPOT

__all__ = ["HOPELESS", "Causes", "Selection", "fill_in", "moore_hodgson", "refused", "screen"]

HOPELESS = 5

Bools = NDArray[np.bool_]


class Causes(NamedTuple):
    """Why each prefill was dropped: code (FEASIBLE: it was not), whose deadline or tier, and the numbers."""

    code: Ints
    row: Ints
    needed: Floats
    available: Floats


class Selection(NamedTuple):
    """Standing of every prefill, why the dropped ones were, the weight kept, and whether the cap had a say in it."""

    standing: Ints
    causes: Causes
    weight: int
    capped: bool


@compiled
def _no_causes(m: int) -> Causes:
    return Causes(np.zeros(m, np.int64), np.full(m, -1, np.int64), np.zeros(m), np.zeros(m))


@compiled
def _blame(causes: Causes, j: int, code: int, row: int, needed: float, available: float) -> None:
    causes.code[j] = code
    causes.row[j] = row
    causes.needed[j] = needed
    causes.available[j] = available


@compiled
def screen(problem: Problem, asked: Bools, slack_s: float) -> tuple[Bools, Causes]:
    """Asked prefills that are not hopeless: alone in the next batch, the first token would still be in time."""
    base, queue, coef = problem.base, problem.queue, problem.coef
    tokens = 0
    draft = 0
    requests = base.steps.shape[0]
    for c in range(problem.tiers.tpot.shape[0]):
        here = base.number[c, 0] + base.number[problem.tiers.tpot.shape[0] + c, 0]
        tokens += here * problem.tiers.verify[c]
        if here > 0:
            draft = max(draft, problem.tiers.verify[c] - 1)
    hopeful = asked.copy()
    causes = _no_causes(asked.shape[0])
    for j in range(asked.shape[0]):
        if asked[j]:
            context = base.context[0] + queue.computed[j]
            prefill = work(problem.attention, queue.computed[j], queue.remaining[j])
            alone = seconds(coef, tokens + prefill, context, requests + 1, draft)
            left = queue.deadline[j] - problem.start_s - problem.limits.margin_s - slack_s
            if alone > left + EPS_S:
                hopeful[j] = False
                _blame(causes, j, HOPELESS, j, alone, left)
    return hopeful, causes


@compiled
def refused(nothing: Selection, hopeful: Bools, found: Feasibility) -> Selection:
    """Keep nothing, for the one reason found."""
    old = nothing.causes
    causes = Causes(old.code.copy(), old.row.copy(), old.needed.copy(), old.available.copy())
    for j in range(hopeful.shape[0]):
        if hopeful[j]:
            _blame(causes, j, found.code, found.row, found.needed, found.available)
    return Selection(nothing.standing, causes, nothing.weight, nothing.capped or found.capped)


@compiled
def _keep_cheapest_prefix(problem: Problem, standing: Ints, hopeful: Bools, causes: Causes) -> None:
    """Where memory cannot hold all that is asked, keep those that need least of it."""
    queue = problem.queue
    trial = standing.copy()
    trial[hopeful] = IN_TIME
    if memory_surely_fits(problem, trial):
        standing[:] = trial
        return
    rows = np.nonzero(hopeful)[0]
    demand = (queue.remaining[rows] + queue.computed[rows] + queue.output[rows]) / queue.weight[rows]
    order = rows[np.argsort(demand)]
    at_once = np.zeros(standing.shape[0], np.int64)
    fits = 0
    over = order.shape[0] + 1
    tried = order.shape[0]
    needed = 0
    while fits + 1 < over:
        for i in range(order.shape[0]):
            trial[order[i]] = IN_TIME if i < tried else LEFT_OUT
        peak = forecast(problem, trial, at_once, at_once).peak_blocks
        if peak <= problem.limits.blocks:
            fits = tried
        else:
            over = tried
            needed = peak
        tried = (fits + over) // 2
    for i in range(order.shape[0]):
        if i < fits:
            standing[order[i]] = IN_TIME
        else:
            _blame(causes, order[i], MISS_BLOCKS, -1, needed, problem.limits.blocks)


@compiled
def _to_drop(problem: Problem, standing: Ints, hopeful: Bools, code: int, finish_s: Floats, upto: int) -> int:
    """The asked prefill to drop, -1 if none: the longest per weight among rows up to `upto`, or the largest in KV."""
    queue = problem.queue
    worst = -1
    worst_key = -1.0
    for j in range(min(upto + 1, standing.shape[0])):
        if hopeful[j] and standing[j] == IN_TIME:
            if code == MISS_TPOT and finish_s.shape[0] > 0 and np.isinf(finish_s[j]):
                continue
            length = queue.remaining[j]
            if code == MISS_BLOCKS:
                length += queue.computed[j] + queue.output[j]
            key = length / queue.weight[j]
            if key > worst_key:
                worst = j
                worst_key = key
    return worst


@compiled
def moore_hodgson(
    fluid: Fluid, stated: bool, promised: Ints, hopeful: Bools, causes: Causes, late_by_s: Floats, enough: int
) -> Selection:
    """Keep what Moore-Hodgson keeps. Gives up early, with what it has, once less weight than `enough` is left."""
    problem = fluid.problem
    queue = problem.queue
    m = promised.shape[0]
    standing = promised.copy()
    causes = Causes(causes.code.copy(), causes.row.copy(), causes.needed.copy(), causes.available.copy())
    if stated:
        standing[hopeful] = IN_TIME
    else:
        _keep_cheapest_prefix(problem, standing, hopeful, causes)
    weight = 0
    for j in range(m):
        if hopeful[j] and standing[j] == IN_TIME:
            weight += queue.weight[j]
    capped = False
    while weight > 0:
        found = check(fluid, stated, standing, late_by_s)
        capped = capped or found.capped
        if found.code == FEASIBLE:
            break
        upto = found.row if found.code == MISS_DEADLINE and standing[found.row] != LATE else m
        if stated:
            upto = found.row
        drop = _to_drop(problem, standing, hopeful, found.code, found.finish_s, upto)
        if drop < 0:
            drop = _to_drop(problem, standing, hopeful, MISS_DEADLINE, found.finish_s, m)
        standing[drop] = LEFT_OUT
        weight -= queue.weight[drop]
        _blame(causes, drop, found.code, found.row, found.needed, found.available)
        if weight < enough:
            break
    return Selection(standing, causes, weight, capped)


@compiled
def fill_in(fluid: Fluid, stated: bool, kept: Selection, hopeful: Bools, late_by_s: Floats, order: Ints) -> Selection:
    """Add, in `order`, what still fits beside what is kept. Starting from nothing, in order of arrival: greedy."""
    standing = kept.standing.copy()
    old = kept.causes
    causes = Causes(old.code.copy(), old.row.copy(), old.needed.copy(), old.available.copy())
    weight = kept.weight
    capped = kept.capped
    for i in range(order.shape[0]):
        j = order[i]
        if not hopeful[j] or standing[j] != LEFT_OUT:
            continue
        standing[j] = IN_TIME
        found = check(fluid, stated, standing, late_by_s)
        capped = capped or found.capped
        if found.code == FEASIBLE:
            weight += fluid.problem.queue.weight[j]
            _blame(causes, j, FEASIBLE, -1, 0.0, 0.0)
        else:
            standing[j] = LEFT_OUT
            _blame(causes, j, found.code, found.row, found.needed, found.available)
    return Selection(standing, causes, weight, capped)
