"""The stated model of the dynamic program: the simulated plan with its batches melted into a rate.

Prefills are served one after the other in deadline order. With n decoders per tier, batches have the longest period
that keeps every populated tier on pace (with speculation: the best period), and what the decoders leave of such a batch
is prefill, so prefill flows at

    rate(n) = (tokens_within(period(n)) - decode tokens) / period(n).

A served prefill becomes a decoder of its tier. KV in use before is a step function of time: every running request is
charged its peak until it ends. A prefill is charged its peak from its start, and starts when that fits. The first
token comes p / rate after the start, and not before a batch that holds decoders and prompt could be through.

This is what makes an exact dynamic program possible: the future depends on a subset only through its count per tier,
the time its last prefill ends (earlier is never worse), and its KV (less is never worse).
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Floats, Ints
from services.core.compiled import compiled, expected_tokens, seconds, tokens_within
from services.core.prefill_work import work
from services.core.problem import EPS_S, Problem

__all__ = ["Flow", "Fluid", "advance", "first_miss", "flow_at", "fluid_of"]


class Fluid(NamedTuple):
    """A problem in the stated model. `demand` is each prefill's peak in blocks; `acceptance` has a rate per tier, or
    none where drafts are not chosen here. Background KV is free[i] blocks from start + from_s[i] on, increasing."""

    problem: Problem
    cap_s: float
    running: Ints
    demand: Ints
    from_s: Floats
    free: Ints
    acceptance: Floats
    max_verify: int


class Flow(NamedTuple):
    """Prefill rate with given decoders, tokens/s (0 or less: none), and the batch it comes from."""

    rate: float
    period_s: float
    room: int
    tokens: int
    draft: int


@compiled
def _flow_for(fluid: Fluid, counts: Ints, period: float, verify: Ints) -> Flow:
    tokens = 0
    requests = 0
    draft = 0
    for c in range(counts.shape[0]):
        if counts[c] > 0:
            tokens += counts[c] * verify[c]
            requests += counts[c]
            draft = max(draft, verify[c] - 1)
    coef, limits = fluid.problem.coef, fluid.problem.limits
    context = fluid.problem.base.context[0]
    most = min(tokens_within(coef, period + EPS_S, context, requests + 1, draft), limits.max_batch_tokens)
    room = most - tokens
    fits = tokens <= limits.max_batch_tokens and seconds(coef, tokens, context, requests, draft) <= period + EPS_S
    if room <= 0 and fits:
        room = 0
    return Flow(room / period, period, room, tokens, draft)


@compiled
def flow_at(fluid: Fluid, counts: Ints) -> Flow:
    """The best flow with `counts[c]` decoders on tier c: over periods and, where drafts are chosen, over lengths."""
    tiers = fluid.problem.tiers
    num_tiers = counts.shape[0]
    if fluid.acceptance.shape[0] == 0:
        period = fluid.cap_s
        for c in range(num_tiers):
            if counts[c] > 0:
                period = min(period, tiers.gain[c] * tiers.tpot[c])
        return _flow_for(fluid, counts, period, tiers.verify)
    best = Flow(-np.inf, fluid.cap_s, -1, 0, 0)
    verify = np.ones(num_tiers, np.int64)
    for pacer in range(-1, num_tiers):
        if pacer >= 0 and counts[pacer] == 0:
            continue
        for length in range(1, fluid.max_verify + 1 if pacer >= 0 else 2):
            period = fluid.cap_s
            if pacer >= 0:
                period = min(period, expected_tokens(length, fluid.acceptance[pacer]) * tiers.tpot[pacer])
            possible = True
            for c in range(num_tiers):
                verify[c] = 1
                while (
                    counts[c] > 0 and expected_tokens(verify[c], fluid.acceptance[c]) * tiers.tpot[c] < period - EPS_S
                ):
                    verify[c] += 1
                    if verify[c] > fluid.max_verify:
                        possible = False
                        break
            if possible:
                flow = _flow_for(fluid, counts, period, verify)
                if flow.rate > best.rate:
                    best = flow
    return best


@compiled
def advance(fluid: Fluid, flow: Flow, j: int, clock_s: float, used: int) -> tuple[float, float]:
    """Serve prefill j after everything until `clock_s` with `used` blocks: when it ends, and its first token.

    Both are relative to the start of the plan, and infinite where it never fits. Never earlier for a later clock, a
    smaller rate or more blocks in use.
    """
    start = np.inf
    wanted = used + fluid.demand[j]
    for i in range(fluid.free.shape[0]):
        if fluid.free[i] >= wanted:
            start = max(clock_s, fluid.from_s[i])
            break
    if start == np.inf or flow.room <= 0:
        return np.inf, np.inf
    problem = fluid.problem
    tokens = work(problem.attention, problem.queue.computed[j], problem.queue.remaining[j])
    end = start + tokens / flow.rate
    context = problem.base.context[0]
    batch = seconds(problem.coef, flow.tokens + min(tokens, flow.room), context, 1, flow.draft)
    return end, max(end, start + batch)


@compiled
def first_miss(fluid: Fluid, standing: Ints) -> tuple[int, bool, float]:
    """Serve the prefills that have a standing: the first in-time one that misses (-1: none), whether it is for want
    of KV, and when the last ends. One with standing 2 is served in its turn but cannot miss."""
    queue = fluid.problem.queue
    counts = fluid.running.copy()
    clock = 0.0
    used = 0
    for j in range(standing.shape[0]):
        if standing[j] == 0:
            continue
        flow = flow_at(fluid, counts)
        end, first = advance(fluid, flow, j, clock, used)
        counts[queue.tier[j]] += 1
        due = queue.deadline[j] - fluid.problem.start_s - fluid.problem.limits.margin_s
        too_many = counts.sum() > fluid.problem.limits.seats or flow_at(fluid, counts).room < 0
        if standing[j] == 1 and (first > due + EPS_S or too_many):
            return j, fluid.free[-1] < used + fluid.demand[j], clock
        if end < np.inf:
            clock = end
        used += fluid.demand[j]
    return -1, False, clock


@compiled
def fluid_of(problem: Problem, cap_s: float, acceptance: Floats, max_verify: int) -> Fluid:
    """Melt a problem: one pass over its decoders, which are sorted by the step they end at.

    A tier beyond the end of `acceptance` accepts nothing; draft lengths are not chosen where it is empty.
    """
    base, tiers, queue, limits = problem.base, problem.tiers, problem.queue, problem.limits
    num_tiers = tiers.tpot.shape[0]
    size = limits.block_size
    running = np.zeros(num_tiers, np.int64)
    period = cap_s
    for c in range(num_tiers):
        running[c] = base.number[c, 0] + base.number[num_tiers + c, 0]
        if running[c] > 0:
            period = min(period, tiers.gain[c] * tiers.tpot[c])
    m = queue.deadline.shape[0]
    demand = np.empty(m, np.int64)
    for j in range(m):
        demand[j] = -(-(queue.remaining[j] + queue.computed[j] + queue.output[j]) // size)
    n = base.steps.shape[0]
    from_s = np.zeros(n + 1)
    free = np.zeros(n + 1, np.int64)
    held = 0
    for p in range(n - 1, -1, -1):
        free[p + 1] = limits.blocks - held
        from_s[p + 1] = base.steps[p] * period
        held += -(-int(np.ceil(base.length[p] + base.steps[p] * tiers.gain[base.tier[p]])) // size)
    free[0] = limits.blocks - held
    rates = np.zeros(num_tiers if acceptance.shape[0] > 0 else 0)
    for c in range(min(rates.shape[0], acceptance.shape[0])):
        rates[c] = acceptance[c]
    return Fluid(problem, cap_s, running, demand, from_s, free, rates, max_verify)
