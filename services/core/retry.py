"""When a request that does not fit now would fit: the retry delay, computed from the plan.

The same SLO asked for again d seconds later has its deadline d later too. Each thing that may run out gives the
earliest d from what is known to end, and the largest counts:

* prefill budget: served after everything kept, the first token comes late by some time; that much later it is in time;
* KV blocks: the step at which enough of the running requests have ended, each charged its peak until it ends;
* TPOT and seats: the step at which few enough decoders are left.

Steps become seconds at the mean batch of the plan. Nothing new is assumed to arrive in between.
"""

import math
from collections.abc import Sequence

import numpy as np

from services.core.compiled import seconds
from services.core.fluid import fluid_of
from services.core.prefill_work import work
from services.core.problem import Problem
from services.core.solver import Solution
from services.core.view import Prefill

__all__ = ["AT_ONCE_S", "earliest_fit_s"]

AT_ONCE_S = 0.001
"""The delay to tell where the same SLO would fit if it were asked for anew: 0 stands for "not known" in messages."""


def earliest_fit_s(problem: Problem, solution: Solution, items: Sequence[Prefill], row: int) -> float:
    """Seconds from the start of the plan until item `row` would fit; 0 if it does now, inf if it never will."""
    if solution.standing[row]:
        return 0.0
    item = items[row]
    if _alone_s(problem, item, 0) > _window_s(problem, item):
        return math.inf
    late_s = float(solution.finish_s[row]) - item.deadline_s + problem.limits.margin_s
    if not math.isfinite(late_s):
        late_s = 0.0
    kept = np.nonzero(solution.standing)[0]
    return max(0.0, late_s, _memory_s(problem, solution, row, kept), _decoders_s(problem, solution, item, kept))


def _memory_s(problem: Problem, solution: Solution, row: int, kept: np.ndarray) -> float:
    fluid = fluid_of(problem, solution.cap_s, np.zeros(0), 1)
    lasting = int(fluid.demand[kept].sum())
    enough = np.nonzero(fluid.free - lasting >= fluid.demand[row])[0]
    if len(enough) == 0:
        enough = np.nonzero(fluid.free >= fluid.demand[row])[0]
        if len(enough) == 0:
            return math.inf
        # Only once kept requests have ended as well.
        return float(fluid.from_s[enough[0]]) + _longest_s(problem, solution, kept)
    return float(fluid.from_s[enough[0]])


def _decoders_s(problem: Problem, solution: Solution, item: Prefill, kept: np.ndarray) -> float:
    """Until decoding with the item is within every TPOT, the item alone within its TTFT, and a seat is free."""
    steps = problem.base.steps
    pace_s = float((problem.tiers.tpot * problem.tiers.gain).min())
    window_s = _window_s(problem, item)
    for ended in range(len(steps) + 1):
        running = len(steps) - ended + len(kept) + 1
        verify = int(problem.tiers.verify.max())
        decode_s = seconds(problem.coef, running * verify, problem.base.context[ended], running, verify - 1)
        alone_s = _alone_s(problem, item, len(steps) - ended)
        if running <= problem.limits.seats and decode_s <= pace_s and alone_s <= window_s:
            return 0.0 if ended == 0 else float(steps[ended - 1]) * pace_s
    return _longest_s(problem, solution, kept)


def _window_s(problem: Problem, item: Prefill) -> float:
    """The time a first token has at best: all of its TTFT, where the engine is free when it arrives."""
    left_s = item.deadline_s - problem.start_s
    whole_s = item.deadline_s - item.arrival_s
    return (max(left_s, whole_s) if math.isfinite(whole_s) else left_s) - problem.limits.margin_s


def _alone_s(problem: Problem, item: Prefill, decoders: int) -> float:
    """A batch of the item's prefill and the `decoders` that run longest, each with the longest draft of any tier."""
    context = float(problem.base.context[len(problem.base.steps) - decoders]) + item.computed_tokens
    verify = int(problem.tiers.verify.max()) if decoders else 1
    tokens = decoders * verify + work(problem.attention, item.computed_tokens, item.remaining_tokens)
    return float(seconds(problem.coef, tokens, context, decoders + 1, verify - 1))


def _longest_s(problem: Problem, solution: Solution, kept: np.ndarray) -> float:
    """Until everything that runs or was kept has ended, at the pace of the tightest tier."""
    pace_s = float((problem.tiers.tpot * problem.tiers.gain).min())
    last = int(problem.base.steps.max(initial=0))
    outputs = int(problem.queue.output[kept].max(initial=0))
    done_s = float(solution.finish_s[kept].max(initial=problem.start_s)) - problem.start_s
    return max(last * pace_s, done_s + outputs * pace_s)
