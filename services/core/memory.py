"""KV forecast in steps, not seconds.

Every request on a tier advances in every batch, so the number of KV blocks after k batches needs no time estimate: it
is the sum over requests alive after k batches of ceil((context + k) / block). It only falls where a request ends, so
its peak is found by looking at the last step of each. Prefills count with their whole prompt from the batch in which
the plan begins them (an upper bound) and grow from the batch after their first token. The same pass finds the longest
decode-only batch ahead, the other question that needs no clock: where it exceeds the tightest TPOT alive, decoding
alone is too much.

One pass over the ends, last first, adds requests to running sums. The rounding up to whole blocks is exact: all grow
in step, so requests with the same remainder modulo the block size stay together (with speculation, where growth is a
fraction, it is an upper bound).

Most plans of a replica that is not full need no look ahead at all: where everything would fit even if no request ended
before the others, `surely_fits` says so from a few sums.
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Ints
from services.core.compiled import compiled, seconds
from services.core.problem import Base, Problem
from services.core.simulate import IN_TIME, LEFT_OUT

__all__ = ["Forecast", "forecast", "memory_lasts", "memory_surely_fits", "surely_fits", "with_peak"]


class Forecast(NamedTuple):
    """Peak of KV blocks ahead, and where a decode-only batch exceeds its tier's TPOT by most.

    `excess_s` is that excess (negative: room left), `batch_s` the batch, `excess_tier` the tier (-1: no decoders).
    """

    peak_blocks: int
    peak_step: int
    excess_s: float
    batch_s: float
    excess_tier: int


@compiled
def memory_surely_fits(problem: Problem, standing: Ints) -> bool:
    """Whether the blocks last even if every request in the plan held those of its end at once."""
    queue, size = problem.queue, problem.limits.block_size
    blocks = problem.base.most_blocks + problem.tiers.tpot.shape[0] + 1
    for j in range(standing.shape[0]):
        if standing[j] != LEFT_OUT:
            most = queue.remaining[j] + queue.computed[j] + queue.output[j] + problem.tiers.verify[queue.tier[j]]
            blocks += most / size + 1
    return bool(blocks <= problem.limits.blocks)


@compiled
def with_peak(problem: Problem) -> Problem:
    """The same problem, its decoders known to need no more blocks than their own forecast says: a closer bound."""
    base, queue = problem.base, problem.queue
    rows = queue.tier.shape[0]
    if memory_surely_fits(problem, np.full(rows, IN_TIME, np.int64)):
        return problem
    never = np.full(rows, -1, np.int64)
    alone = forecast(problem, np.full(rows, LEFT_OUT, np.int64), never, never).peak_blocks
    most_blocks = min(base.most_blocks, float(alone))
    closer = Base(
        base.steps, base.tier, base.length, base.number, base.least, base.context, base.last_due, base.last_tier,
        base.most_context, most_blocks,
    )  # fmt: skip
    return Problem(problem.coef, problem.attention, problem.start_s, problem.limits, problem.tiers, closer, queue)


@compiled
def memory_lasts(problem: Problem, standing: Ints, began: Ints, joined: Ints) -> bool:
    """Whether the blocks last for the plan (see `forecast`)."""
    if memory_surely_fits(problem, standing):
        return True
    return forecast(problem, standing, began, joined).peak_blocks <= problem.limits.blocks


@compiled
def surely_fits(problem: Problem, standing: Ints) -> bool:
    """Whether a forecast of the plan, whatever its steps, finds memory enough and no batch beyond a tier's TPOT.

    True is certain; False says nothing.
    """
    if not memory_surely_fits(problem, standing):
        return False
    limits, tiers, base, queue = problem.limits, problem.tiers, problem.base, problem.queue
    context = base.most_context
    number = base.number[:, 0].copy()
    for j in range(standing.shape[0]):
        if standing[j] != LEFT_OUT:
            number[queue.tier[j]] += 1
            context += queue.remaining[j] + queue.computed[j] + queue.output[j]
    tokens = 0
    draft = 0
    tight = np.inf
    num_tiers = tiers.tpot.shape[0]
    for c in range(num_tiers):
        here = number[c] + number[num_tiers + c]
        if here > 0:
            tokens += here * tiers.verify[c]
            draft = max(draft, tiers.verify[c] - 1)
            tight = min(tight, tiers.gain[c] * tiers.tpot[c])
    longest = seconds(problem.coef, tokens, context, number.sum(), draft)
    return tokens <= limits.max_batch_tokens and longest <= tight


@compiled
def _blocks(remainders: Ints, total: float, number: int, k: int, size: int) -> int:
    """Blocks of `number` requests of length L + k, `total` their sum of L, counted by L modulo the block size."""
    pad = 0
    missing = (size - k % size) % size  # of the last block of a request whose remainder is r
    for r in range(size):
        pad += remainders[r] * missing
        missing = missing - 1 if missing > 0 else size - 1
    return (int(total) + number * k + pad) // size


@compiled
def forecast(problem: Problem, standing: Ints, began: Ints, joined: Ints) -> Forecast:
    """Look ahead over base decoders and the prefills in the plan.

    A prefill's prompt is in memory from step `began` (those with computed tokens: now) and grows from step `joined`.
    """
    coef, limits, tiers, base, queue = problem.coef, problem.limits, problem.tiers, problem.base, problem.queue
    size = limits.block_size
    num_tiers = tiers.tpot.shape[0]
    n = base.steps.shape[0]
    rows = np.nonzero(standing != LEFT_OUT)[0]
    m = rows.shape[0]
    start = np.maximum(joined[rows], 0)
    last_join = 0
    last = np.empty(m, np.int64)
    prompt = np.empty(m, np.int64)
    prompt_blocks = np.empty(m, np.int64)
    grows = np.zeros(m, np.bool_)
    for i in range(m):
        j = rows[i]
        last_join = max(last_join, start[i])
        last[i] = start[i] - 1 + int(np.ceil((queue.output[j] - 1) / tiers.gain[queue.tier[j]] - 1e-9))
        prompt[i] = queue.remaining[j] + queue.computed[j]
        prompt_blocks[i] = -(-prompt[i] // size)
    by_end = np.argsort(last)
    remainders = np.zeros(size, np.int64)
    number = np.zeros(num_tiers, np.int64)
    shifted = np.zeros(num_tiers)
    early_number = np.zeros(num_tiers, np.int64)
    early_shifted = np.zeros(num_tiers)
    whole = 0.0
    whole_number = 0
    peak_blocks = 0
    peak_step = 0
    excess = -np.inf
    batch_s = 0.0
    excess_tier = -1
    b = n - 1
    i = m - 1
    while b >= 0 or i >= 0:
        k = max(base.steps[b] - 1 if b >= 0 else -1, last[by_end[i]] if i >= 0 else -1)
        while b >= 0 and base.steps[b] - 1 == k:
            c = base.tier[b]
            grown = base.length[b] + tiers.verify[c]
            number[c] += 1
            shifted[c] += base.length[b]
            if tiers.gain[c] == 1.0:
                remainders[grown % size] += 1
                whole += grown
                whole_number += 1
            b -= 1
        while i >= 0 and last[by_end[i]] == k:
            a = by_end[i]
            c = queue.tier[rows[a]]
            number[c] += 1
            shifted[c] += prompt[a] - start[a] * tiers.gain[c]
            if tiers.gain[c] == 1.0:
                grown = prompt[a] - start[a] + tiers.verify[c]
                remainders[grown % size] += 1
                whole += grown
                whole_number += 1
                grows[a] = True
            i -= 1
        blocks = 0
        early_number[:] = 0
        early_shifted[:] = 0.0
        if k < last_join:
            # Not decoding yet: their prompt counts once begun, not the length they would have grown back from.
            for a in range(m):
                if start[a] > k:
                    j = rows[a]
                    c = queue.tier[j]
                    if began[j] <= k or queue.computed[j] > 0:
                        blocks += prompt_blocks[a]
                    if tiers.gain[c] != 1.0:
                        early_number[c] += 1
                        early_shifted[c] += prompt[a] - start[a] * tiers.gain[c]
                    elif grows[a]:
                        grown = prompt[a] - start[a] + tiers.verify[c]
                        remainders[grown % size] -= 1
                        whole -= grown
                        whole_number -= 1
                        grows[a] = False
        if whole_number > 0:
            blocks += _blocks(remainders, whole, whole_number, k, size)
        tokens = 0
        requests = 0
        draft = 0
        context = 0.0
        tight = np.inf
        tight_tier = -1
        for c in range(num_tiers):
            if number[c] > 0:
                tokens += number[c] * tiers.verify[c]
                requests += number[c]
                draft = max(draft, tiers.verify[c] - 1)
                context += shifted[c] + number[c] * k * tiers.gain[c]
                if tiers.gain[c] != 1.0:
                    ends = shifted[c] - early_shifted[c]
                    ends += (number[c] - early_number[c]) * (k * tiers.gain[c] + tiers.verify[c] + size - 1)
                    blocks += int(np.ceil(ends / size))
                if tiers.gain[c] * tiers.tpot[c] < tight:
                    tight = tiers.gain[c] * tiers.tpot[c]
                    tight_tier = c
        if blocks > peak_blocks:
            peak_blocks = blocks
            peak_step = k
        if k >= last_join and tight_tier >= 0:
            # More tokens than a batch holds, which drafts make possible, take several.
            s = seconds(coef, tokens, context, requests, draft) * max(1, -(-tokens // limits.max_batch_tokens))
            if s - tight > excess:
                excess, batch_s, excess_tier = s - tight, s, tight_tier
    return Forecast(peak_blocks, peak_step, excess, batch_s, excess_tier)
