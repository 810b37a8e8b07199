"""KV forecast in steps, not seconds.

Every request on a tier advances in every batch, so the number of KV blocks after k batches needs no time estimate: the
sum over requests alive after k batches of ceil((context + k) / block). It only falls where a request ends, so its peak
is found by looking at the last step of each. Prefills count with their whole prompt at once (an upper bound) and grow
from the batch in which the plan gives them their first token. The same pass tells the largest decode-only batch time
ahead against the tightest TPOT then alive, which is the other question that needs no clock.
"""

from typing import NamedTuple

import numpy as np

from services.core.columns import Floats, Ints, Queue, TierColumns
from services.core.compiled import compiled, seconds

__all__ = ["Forecast", "forecast_steps"]

_EPS = 1e-9


class Forecast(NamedTuple):
    """Peak of KV blocks over the coming steps, and the worst excess of decode time over the tightest TPOT alive.

    `excess_s` is positive where decoding alone would break TPOT; `excess_row` is the tier whose TPOT that is.
    """

    peak_blocks: int
    peak_step: int
    excess_s: float
    excess_row: int


@compiled
def forecast_steps(
    coef: Floats,
    block_size: int,
    tier: Ints,
    context: Ints,
    remaining: Ints,
    tiers: TierColumns,
    queue: Queue,
    active: Ints,
    joined: Ints,
) -> Forecast:
    """Look ahead over decoders on tiers and active prefills; `joined` is the step at which each starts to decode."""
    n = tier.shape[0]
    m = queue.tier.shape[0]
    start = np.zeros(n + m, np.int64)
    end = np.zeros(n + m, np.int64)
    length = np.zeros(n + m, np.int64)
    row = np.zeros(n + m, np.int64)
    size = 0
    for i in range(n):
        if tier[i] >= 0:
            end[size] = max(1, int(np.ceil(remaining[i] / tiers.gain[tier[i]] - _EPS)))
            length[size] = context[i]
            row[size] = tier[i]
            size += 1
    last_join = 0
    for j in range(m):
        if active[j] > 0:
            start[size] = max(0, joined[j])
            last_join = max(last_join, start[size])
            end[size] = start[size] + max(1, int(np.ceil((queue.output[j] - 1) / tiers.gain[queue.tier[j]] - _EPS)))
            length[size] = queue.remaining[j] + queue.computed[j]
            row[size] = queue.tier[j]
            size += 1
    order = np.argsort(end[:size])
    peak_blocks = 0
    peak_step = 0
    excess = -np.inf
    excess_row = -1
    for e in range(size):
        k = end[order[e]] - 1
        if e + 1 < size and end[order[e + 1]] - 1 == k and e > 0 and end[order[e - 1]] - 1 == k:
            continue
        blocks = 0
        tokens = 0
        requests = 0
        draft = 0
        total = 0.0
        tight = np.inf
        tight_row = -1
        for a in range(e, size):
            i = order[a]
            grown = max(0, k - start[i])
            tokens_then = (
                length[i] + int(np.ceil(grown * tiers.gain[row[i]])) + (tiers.verify[row[i]] if k >= start[i] else 0)
            )
            blocks += -(-tokens_then // block_size)
            tokens += tiers.verify[row[i]]
            draft = max(draft, tiers.verify[row[i]] - 1)
            requests += 1
            total += tokens_then
            if tiers.gain[row[i]] * tiers.tpot[row[i]] < tight:
                tight = tiers.gain[row[i]] * tiers.tpot[row[i]]
                tight_row = row[i]
        if blocks > peak_blocks:
            peak_blocks = blocks
            peak_step = k
        if k >= last_join:
            over = seconds(coef, tokens, total, requests, draft) - tight
            if over > excess:
                excess = over
                excess_row = tight_row
    return Forecast(peak_blocks, peak_step, excess, excess_row)
