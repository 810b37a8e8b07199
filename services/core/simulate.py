"""The simulated plan: the batch former run forward, compiled.

One call answers three questions about a replica with a given set of prefills: what the next batch is, when every
prefill would finish, and which deadline would be missed first. The state is compact. Every decoder on a tier is in
every batch, so after k steps all of them have moved k * TPOT further from the deadline they started with; per tier the
count and the least slack suffice, and predicted finishes are a pointer into the decoders sorted by remaining steps.

Tiers come twice in these arrays: row t for decoders in time, row n + t for those already late, which must hurry
(their batches have the minimum size) but can no longer be harmed.
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Floats, Ints, Queue, TierColumns
from services.core.compiled import compiled, seconds, tokens_within

__all__ = [
    "FEASIBLE",
    "LIMIT_CAP",
    "LIMIT_DEADLINE",
    "LIMIT_FLOOR",
    "LIMIT_SLACK",
    "LIMIT_WORK",
    "MISS_DEADLINE",
    "MISS_TPOT",
    "Base",
    "Outcome",
    "Rules",
    "prepare",
    "simulate",
]

FEASIBLE, MISS_DEADLINE, MISS_TPOT = 0, 1, 2
LIMIT_CAP, LIMIT_SLACK, LIMIT_DEADLINE, LIMIT_FLOOR, LIMIT_WORK = 0, 1, 2, 3, 4

_EPS = 1e-9
_MAX_BATCHES = 4096


class Rules(NamedTuple):
    """Settings of a plan, as the kernels read them."""

    margin_s: float
    min_prefill_tokens: int
    max_batch_tokens: int
    hold_first_token: bool


class Base(NamedTuple):
    """Decoders on tiers, sorted by remaining steps; column p describes those from position p on."""

    steps: Ints
    number: Ints
    least: Floats
    context: Floats


class Outcome(NamedTuple):
    """What a simulated plan found. The arrays are per prefill; `row` is the prefill or tier that misses."""

    code: int
    row: int
    at_s: float
    first_duration_s: float
    first_limit: int
    batches: int
    finish_s: Floats
    joined: Ints
    first_tokens: Ints


@compiled
def prepare(
    coef: Floats,
    start_s: float,
    margin_s: float,
    tier: Ints,
    deadline: Floats,
    context: Ints,
    remaining: Ints,
    tiers: TierColumns,
) -> Base:
    """Sort the decoders that are on a tier by remaining steps and sum them up from the back."""
    num_tiers = tiers.tpot.shape[0]
    rows = np.nonzero(tier >= 0)[0]
    n = rows.shape[0]
    steps = np.empty(n, np.int64)
    tokens = 0
    total_context = 0.0
    draft = 0
    for i in range(n):
        r = rows[i]
        steps[i] = max(1, int(np.ceil(remaining[r] / tiers.gain[tier[r]] - _EPS)))
        tokens += tiers.verify[tier[r]]
        draft = max(draft, tiers.verify[tier[r]] - 1)
        total_context += context[r]
    shortest = seconds(coef, tokens, total_context, n, draft)
    order = np.argsort(steps)
    count = np.zeros((2 * num_tiers, n + 1), np.int64)
    least = np.full((2 * num_tiers, n + 1), np.inf)
    from_context = np.zeros(n + 1)
    for p in range(n - 1, -1, -1):
        r = rows[order[p]]
        slack = deadline[r] - start_s - margin_s
        row = tier[r] if slack >= shortest - _EPS else num_tiers + tier[r]
        for c in range(2 * num_tiers):
            count[c, p] = count[c, p + 1]
            least[c, p] = least[c, p + 1]
        count[row, p] += 1
        least[row, p] = min(least[row, p], slack)
        from_context[p] = from_context[p + 1] + context[r]
    return Base(steps[order], count, least, from_context)


@compiled
def simulate(
    coef: Floats,
    start_s: float,
    cap_s: float,
    rules: Rules,
    tiers: TierColumns,
    base: Base,
    queue: Queue,
    active: Ints,
) -> Outcome:
    """Run the batch former forward until every active prefill has its first token or something is late.

    `active` is 0 for prefills left out, 1 for those whose deadline counts, 2 for those known to be late.
    """
    num_tiers = tiers.tpot.shape[0]
    m = queue.deadline.shape[0]
    left = queue.remaining.copy()
    done = queue.computed.copy()
    finish = np.full(m, np.inf)
    joined = np.full(m, -1, np.int64)
    first_tokens = np.zeros(m, np.int64)
    join_count = np.zeros(num_tiers, np.int64)
    join_least = np.full(num_tiers, np.inf)
    join_clock = np.full(m, np.inf)
    join_end = np.zeros(m, np.int64)
    join_context = 0.0
    first_duration = 0.0
    first_limit = LIMIT_WORK
    t = start_s
    p = 0
    n = base.steps.shape[0]
    for k in range(_MAX_BATCHES):
        head = -1
        pending = False
        for j in range(m):
            if active[j] > 0 and left[j] > 0:
                pending = True
                if active[j] == 1:
                    head = j
                    break
        if not pending:
            return Outcome(FEASIBLE, -1, t, first_duration, first_limit, k, finish, joined, first_tokens)
        while p < n and base.steps[p] <= k:
            p += 1
        for j in range(m):
            if joined[j] >= 0 and join_end[j] == k:
                c = queue.tier[j]
                join_count[c] -= 1
                join_clock[j] = np.inf
                join_least[c] = np.inf
                for i in range(m):
                    if queue.tier[i] == c:
                        join_least[c] = min(join_least[c], join_clock[i])
                join_context -= queue.remaining[j] + queue.computed[j] + (k - joined[j]) * tiers.gain[c]
        tokens = 0
        requests = 0
        draft = 0
        grown = 0.0
        slack = np.inf
        slack_row = -1
        hurry = False
        for c in range(num_tiers):
            here = base.number[c, p] + join_count[c]
            late = base.number[num_tiers + c, p]
            if here + late > 0:
                tokens += (here + late) * tiers.verify[c]
                requests += here + late
                draft = max(draft, tiers.verify[c] - 1)
            advance = k * tiers.gain[c] * tiers.tpot[c]
            if here > 0:
                s = min(base.least[c, p] + start_s, join_least[c]) + advance - t
                if s < slack:
                    slack = s
                    slack_row = c
            if late > 0:
                hurry = hurry or base.least[num_tiers + c, p] + start_s + advance - t < slack
            grown += (base.number[c, p] + late) * k * tiers.gain[c]
        context = base.context[p] + grown + join_context
        shortest = seconds(coef, tokens, context, requests, draft)
        floor = seconds(coef, tokens + rules.min_prefill_tokens, context, requests + 1, draft)
        d = cap_s
        limit = LIMIT_CAP
        if hurry or d < floor:
            d = floor
            limit = LIMIT_FLOOR
        if slack < d:
            d = slack
            limit = LIMIT_SLACK
        if d < shortest:
            if slack < shortest - _EPS:
                return Outcome(MISS_TPOT, slack_row, t, first_duration, first_limit, k, finish, joined, first_tokens)
            d = shortest
        if head >= 0 and t + d > queue.deadline[head] - rules.margin_s:
            room = queue.deadline[head] - rules.margin_s - t
            alone = seconds(coef, tokens + left[head], context + done[head], requests + 1, draft)
            if alone > min(room, d) + _EPS:
                return Outcome(
                    MISS_DEADLINE, head, t + alone, first_duration, first_limit, k, finish, joined, first_tokens
                )
            d = max(room, alone)
            limit = LIMIT_DEADLINE
        used = tokens
        shape_context = context
        shape_requests = requests
        full = False
        for only in range(1, 3):
            for j in range(m):
                if full or active[j] != only or left[j] == 0:
                    continue
                most = tokens_within(coef, d + _EPS, shape_context + done[j], shape_requests + 1, draft)
                take = min(left[j], min(most, rules.max_batch_tokens) - used)
                if take <= 0:
                    full = True
                    break
                shape_context += done[j]
                shape_requests += 1
                used += take
                left[j] -= take
                done[j] += take
                if k == 0:
                    first_tokens[j] = take
                full = left[j] > 0
        spent = d if full else seconds(coef, used, shape_context, shape_requests, draft)
        if k == 0:
            first_duration = d
            first_limit = limit
        t += spent
        for c in range(num_tiers):
            join_context += join_count[c] * tiers.gain[c]
        for j in range(m):
            if active[j] > 0 and left[j] == 0 and joined[j] < 0:
                c = queue.tier[j]
                finish[j] = t
                joined[j] = k + 1
                join_end[j] = k + 1 + max(0, int(np.ceil((queue.output[j] - 1) / tiers.gain[c] - _EPS)))
                if queue.output[j] > 1:
                    held = max(0.0, queue.deadline[j] - t) if rules.hold_first_token else 0.0
                    join_clock[j] = t + tiers.tpot[c] + held - rules.margin_s - (k + 1) * tiers.gain[c] * tiers.tpot[c]
                    join_least[c] = min(join_least[c], join_clock[j])
                    join_count[c] += 1
                    join_context += queue.remaining[j] + queue.computed[j]
                else:
                    join_end[j] = -1
    return Outcome(
        MISS_DEADLINE, max(head, 0), np.inf, first_duration, first_limit, _MAX_BATCHES, finish, joined, first_tokens
    )
