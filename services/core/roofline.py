"""Arithmetic of the roofline model, in the subset of Python that numba compiles too.

`coef` has one row `(k_tok, k_ctx, k_req, k_step, b)` per segment: a tuple of tuples here, a float64 array in the
compiled kernels, which wrap these very functions. This module imports nothing, so that a process which only needs a
prediction now and then does not pay for a compiler.
"""

from typing import Any

__all__ = ["MAX_TOKENS", "seconds", "tokens_within"]

MAX_TOKENS = 1 << 30
"""Answer of `tokens_within` where time does not limit tokens."""


def seconds(coef: Any, tokens: float, context_tokens: float, requests: float, draft_steps: float) -> float:
    """Time of one batch: the maximum of the segments' linear forms, seconds."""
    worst = 0.0
    for s in range(len(coef)):
        row = coef[s]
        t = row[0] * tokens + row[1] * context_tokens + row[2] * requests + row[3] * draft_steps + row[4]
        worst = max(worst, t)
    return worst


def tokens_within(coef: Any, limit_s: float, context_tokens: float, requests: float, draft_steps: float) -> int:
    """Largest number of tokens whose batch lasts at most `limit_s`; 0 if not even one fits.

    Division first, then single steps against the forward form, so that the two agree to the last bit.
    """

    def forward(n: int) -> float:
        worst = 0.0
        for s in range(len(coef)):
            row = coef[s]
            worst = max(worst, row[0] * n + row[1] * context_tokens + row[2] * requests + row[3] * draft_steps + row[4])
        return worst

    best = float(MAX_TOKENS)
    for s in range(len(coef)):
        row = coef[s]
        rest = limit_s - (row[1] * context_tokens + row[2] * requests + row[3] * draft_steps + row[4])
        if row[0] > 0.0:
            best = min(best, rest / row[0])
        elif rest < 0.0:
            return 0
    if best >= MAX_TOKENS:
        return MAX_TOKENS
    n = max(0, int(best))
    while n > 0 and forward(n) > limit_s:
        n -= 1
    while n < MAX_TOKENS and forward(n + 1) <= limit_s:
        n += 1
    return n
