"""The simulated plan: the batch former run forward, compiled.

One call answers three questions about a replica and a set of prefills: what the next batch is, when every prefill
would finish, and which deadline would be missed first. The state is compact. Every decoder on a tier is in every batch,
so after k steps all of them have moved k * TPOT beyond the deadline they started with: per tier, the count and the
least slack suffice. Predicted finishes are a pointer into the decoders sorted by remaining steps. A typical plan takes
5 to 20 iterations of a few hundred nanoseconds.
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Floats, Ints
from services.core.compiled import compiled, seconds
from services.core.prefill_work import chunk_within, work
from services.core.problem import EPS_S, Problem

__all__ = [
    "AFTER",
    "FEASIBLE",
    "IN_TIME",
    "LATE",
    "LEFT_OUT",
    "LIMIT_CAP",
    "LIMIT_DEADLINE",
    "LIMIT_FLOOR",
    "LIMIT_SLACK",
    "LIMIT_TOKENS",
    "LIMIT_WORK",
    "MISS_DEADLINE",
    "MISS_TPOT",
    "Load",
    "Outcome",
    "simulate",
]

LEFT_OUT, IN_TIME, LATE, AFTER = 0, 1, 2, 3
"""Standing of a prefill in a plan: not in it; in time; promised but late already, served behind those in time and
joining its tier then; without a promise, served behind everything and joining no tier."""

FEASIBLE, MISS_DEADLINE, MISS_TPOT = 0, 1, 2
LIMIT_CAP, LIMIT_SLACK, LIMIT_DEADLINE, LIMIT_FLOOR, LIMIT_WORK, LIMIT_TOKENS = 0, 1, 2, 3, 4, 5

_MAX_BATCHES = 4096


class Outcome(NamedTuple):
    """What a simulated plan found.

    `row` is the prefill (MISS_DEADLINE) or tier (MISS_TPOT) that misses. `needed` and `available` are prefill tokens
    due and possible by that deadline, or seconds of batch and of slack. `capped`: some batch could have been longer
    but for the cap, so that a larger one would change the plan. Arrays are per prefill: when it finishes, the step its
    prefill begins at, the step from which it decodes (-1: never, in this plan), and its tokens in the first batch.
    """

    code: int
    row: int
    needed: float
    available: float
    end_s: float
    batches: int
    first_limit_s: float
    first_limit: int
    finish_s: Floats
    capped: bool
    began: Ints
    joined: Ints
    first_tokens: Ints


class Load(NamedTuple):
    """Decoders of one batch, and how long their deadlines let it last."""

    tokens: int
    context: float
    requests: int
    draft: int
    slack_s: float
    slack_tier: int
    late_slack_s: float


@compiled
def _load(
    problem: Problem, k: int, t: float, p: int, join_number: Ints, join_least: Floats, join_context: float
) -> Load:
    """Decoders alive in batch k, which starts at t; p points at the first base decoder still running."""
    tiers, base = problem.tiers, problem.base
    num_tiers = tiers.tpot.shape[0]
    tokens = 0
    requests = 0
    draft = 0
    context = base.context[p] + join_context
    slack = np.inf
    slack_tier = -1
    late_slack = np.inf
    for c in range(num_tiers):
        late = base.number[num_tiers + c, p]
        on_time = base.number[c, p] + join_number[c]
        if on_time + late == 0:
            continue
        tokens += (on_time + late) * tiers.verify[c]
        requests += on_time + late
        draft = max(draft, tiers.verify[c] - 1)
        context += (base.number[c, p] + late) * k * tiers.gain[c]
        elapsed = t - problem.start_s - k * tiers.gain[c] * tiers.tpot[c] * (1.0 - problem.limits.early_spend)
        s = min(base.least[c, p], join_least[c]) - elapsed
        if on_time > 0 and s < slack:
            slack = s
            slack_tier = c
        if late > 0:
            late_slack = min(late_slack, base.least[num_tiers + c, p] - elapsed)
    return Load(tokens, context, requests, draft, slack, slack_tier, late_slack)


@compiled
def _serving_order(problem: Problem, standing: Ints, behind_s: float) -> Ints:
    """Rows in the order they are served: in time, late, unpromised due after `behind_s`, after; each by deadline."""
    queue = problem.queue
    m = standing.shape[0]
    order = np.empty(m, np.int64)
    size = 0
    for turn in range(4):
        for j in range(m):
            if standing[j] == IN_TIME:
                mine = 2 if not queue.promised[j] and queue.deadline[j] > behind_s else 0
            else:
                mine = 1 if standing[j] == LATE else (3 if standing[j] == AFTER else -1)
            if mine == turn:
                order[size] = j
                size += 1
    return order[:size]


@compiled
def simulate(problem: Problem, standing: Ints, cap_s: float, behind_s: float) -> Outcome:
    """Run the batch former forward until every prefill in the plan has its first token, or something is missed.

    Where promises are late already, `behind_s` is when the last of them is due to be through: unpromised prefills with
    a later deadline wait for them (inf: nothing is late).
    """
    coef, attention, start_s, limits, tiers, base, queue = problem
    num_tiers = tiers.tpot.shape[0]
    m = queue.deadline.shape[0]
    order = _serving_order(problem, standing, behind_s)
    left = queue.remaining.copy()
    done = queue.computed.copy()
    finish = np.full(m, np.inf)
    began = np.full(m, -1, np.int64)
    joined = np.full(m, -1, np.int64)
    join_end = np.full(m, -1, np.int64)
    join_clock = np.full(m, np.inf)
    join_due = np.full(m, np.inf)
    first_tokens = np.zeros(m, np.int64)
    join_number = np.zeros(num_tiers, np.int64)
    join_least = np.full(num_tiers, np.inf)
    join_context = 0.0
    next_end = _MAX_BATCHES
    first_limit_s = 0.0
    first_limit = LIMIT_WORK
    served = 0
    t = start_s
    h = 0
    p = 0
    k = 0
    capped = False
    code = FEASIBLE
    row = -1
    needed = 0.0
    available = 0.0
    while h < order.shape[0] and k < _MAX_BATCHES and code == FEASIBLE:
        while p < base.steps.shape[0] and base.steps[p] <= k:
            p += 1
        if k == next_end:
            next_end = _MAX_BATCHES
            join_least[:] = np.inf
            for i in range(h):
                j = order[i]
                c = queue.tier[j]
                if join_end[j] == k:
                    join_end[j] = -1
                    join_number[c] -= 1
                    join_context -= queue.remaining[j] + queue.computed[j] + (k - joined[j]) * tiers.gain[c]
                elif join_end[j] > k:
                    next_end = min(next_end, join_end[j])
                    join_least[c] = min(join_least[c], join_clock[j])
        tokens, context, requests, draft, slack, slack_tier, late_slack = _load(
            problem, k, t, p, join_number, join_least, join_context
        )
        last_due = np.inf
        last_tier = -1
        if p < base.steps.shape[0] and base.steps[p] == k + 1:
            last_due, last_tier = base.last_due[p], base.last_tier[p]
        if next_end == k + 1:
            for i in range(h):
                if join_end[order[i]] == k + 1 and join_due[order[i]] < last_due:
                    last_due, last_tier = join_due[order[i]], queue.tier[order[i]]
        if last_due - (t - start_s) < slack:
            slack, slack_tier = last_due - (t - start_s), last_tier
        shortest = seconds(coef, tokens, context, requests, draft)
        head = order[h]
        least = tokens + work(attention, done[head], limits.min_prefill_tokens)
        floor = seconds(coef, least, context, requests + 1, draft)
        beside = limits.max_batch_tokens - tokens  # negative: the decoders alone are too many
        most = tokens + (work(attention, done[head], beside) if beside > 0 else beside)
        full = seconds(coef, most, context + done[head], requests + 1, draft)
        capped = capped or cap_s < min(slack, late_slack, full)
        d = max(min(cap_s, late_slack), floor)
        limit = LIMIT_FLOOR if d == floor else (LIMIT_CAP if d == cap_s else LIMIT_SLACK)
        if full < d:
            d = full
            limit = LIMIT_TOKENS
        if slack < d:
            d = slack
            limit = LIMIT_SLACK
        if d < shortest:
            if d < shortest - EPS_S:
                code, row, needed, available = MISS_TPOT, slack_tier, shortest, d
                break
            d = shortest
        if standing[head] == IN_TIME and t + d > queue.deadline[head] - limits.margin_s:
            room = queue.deadline[head] - limits.margin_s - t
            whole = tokens + work(attention, done[head], left[head])
            alone = seconds(coef, whole, context + done[head], requests + 1, draft)
            if alone > min(room, d) + EPS_S or tokens + left[head] > limits.max_batch_tokens:
                last = chunk_within(
                    coef, attention, min(room, d), tokens, context + done[head], requests + 1, draft, done[head]
                )
                code, row = MISS_DEADLINE, head
                needed, available = served + left[head], served + min(left[head] - 1, max(0, last))
                break
            d = max(room, alone)
            limit = LIMIT_DEADLINE
        if k == 0:
            first_limit_s, first_limit = d, limit
        used = float(tokens)
        before = h
        while h < order.shape[0]:
            j = order[h]
            fitting = chunk_within(coef, attention, d + EPS_S, used, context + done[j], requests + 1, draft, done[j])
            take = min(left[j], min(fitting, limits.max_batch_tokens - tokens))
            if take <= 0:
                break
            context += done[j]
            requests += 1
            if began[j] < 0:
                began[j] = k
            used += work(attention, done[j], take)
            tokens += take
            served += take
            left[j] -= take
            done[j] += take
            if k == 0:
                first_tokens[j] = take
            if left[j] > 0:
                break
            h += 1
        t += seconds(coef, used, context, requests, draft)
        k += 1
        for c in range(num_tiers):
            join_context += join_number[c] * tiers.gain[c]
        for i in range(before, h):
            j = order[i]
            c = queue.tier[j]
            finish[j] = t
            joined[j] = k
            if standing[j] == IN_TIME and t > queue.deadline[j] - limits.margin_s + EPS_S:
                code, row, needed, available = MISS_DEADLINE, j, float(served), float(served - queue.remaining[j])
            if queue.output[j] > 1 and standing[j] != AFTER:
                advance = tiers.gain[c] * tiers.tpot[c] * (1.0 - limits.early_spend)
                spend = limits.early_spend * tiers.tpot[c] * max(0, queue.output[j] - 2)
                held = max(0.0, queue.deadline[j] - t) if limits.hold_first_token else 0.0
                held -= queue.in_hand[j]
                due = min(tiers.gain[c], queue.output[j] - 1.0) * tiers.tpot[c] + held + spend
                join_clock[j] = t - start_s + due - limits.margin_s - k * advance
                join_least[c] = min(join_least[c], join_clock[j])
                if tiers.gain[c] != 1.0:
                    join_due[j] = t - start_s + held + (queue.output[j] - 1) * tiers.tpot[c] - limits.margin_s
                join_end[j] = k + int(np.ceil((queue.output[j] - 1) / tiers.gain[c] - 1e-9))
                next_end = min(next_end, join_end[j])
                join_number[c] += 1
                join_context += queue.remaining[j] + queue.computed[j]
    if code == FEASIBLE and h < order.shape[0]:
        code, row = MISS_DEADLINE, order[h]
    return Outcome(
        code, row, needed, available, t, k, first_limit_s, first_limit, finish, capped, began, joined, first_tokens
    )
