"""What a prefill chunk costs: its tokens, and the attention of each to the tokens before it.

The prompt token at position p costs as much as `1 + attention * p` tokens at the start of a prompt. Chunks are measured
in such tokens (*work*), so that the roofline stays linear. The work of a prompt does not depend on how it is cut.
"""

from services.core.columns import Floats
from services.core.compiled import compiled, seconds, tokens_within
from services.core.roofline import MAX_TOKENS

__all__ = ["chunk_within", "work"]


@compiled
def work(attention: float, before: float, tokens: float) -> float:
    """Work of `tokens` prompt tokens after `before` others of the same prompt: the integral of `1 + attention * p`."""
    return tokens + attention * tokens * (before + 0.5 * tokens)


@compiled
def chunk_within(
    coef: Floats,
    attention: float,
    limit_s: float,
    used: float,
    context_tokens: float,
    requests: float,
    draft_steps: float,
    before: float,
) -> int:
    """Largest chunk, in tokens, after `before` others of its prompt that fits into `limit_s` beside `used` work.

    `context_tokens` and `requests` count the chunk's own. Not positive where nothing fits. The quadratic is solved,
    then single steps against the forward form make the two agree to the last bit.
    """
    if attention == 0.0:
        return tokens_within(coef, limit_s, context_tokens, requests, draft_steps) - int(used)
    rest = float(MAX_TOKENS)
    for s in range(coef.shape[0]):
        left_s = limit_s - (coef[s, 1] * context_tokens + coef[s, 2] * requests + coef[s, 3] * draft_steps + coef[s, 4])
        if coef[s, 0] > 0.0:
            rest = min(rest, left_s / coef[s, 0] - used)
        elif left_s < 0.0:
            return 0
    if rest <= 0.0:
        return 0
    slope = 1.0 + attention * before
    n = int(2.0 * rest / (slope + (slope * slope + 2.0 * attention * rest) ** 0.5))
    while n > 0 and seconds(coef, used + work(attention, before, n), context_tokens, requests, draft_steps) > limit_s:
        n -= 1
    while seconds(coef, used + work(attention, before, n + 1), context_tokens, requests, draft_steps) <= limit_s:
        n += 1
    return n
