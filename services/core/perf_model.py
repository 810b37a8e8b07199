"""Predicted time of one engine step: a roofline over a few linear segments.

    T = max_s ( k_tok * work + k_ctx * context_tokens + k_req * requests + k_step * draft_steps + b )
    work = tokens + attention * attended

`tokens` are the tokens computed in the batch, `context_tokens` those already in the KV cache of its requests,
`draft_steps` the sequential steps of a draft model. `attended` sums, over the tokens of prefill chunks, the tokens
before each in its prompt: attention makes a chunk of a long prompt cost more the further on it is. Coefficients are
non-negative seconds, `attention` is their ratio. The arithmetic itself is in `services.core.roofline`, which the
compiled kernels share, and `services.core.prefill_work`.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from services.core import roofline
from services.core.errors import BadModelError

__all__ = ["BatchShape", "PerfModel", "Segment", "attended"]


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What one engine step computes. `attended` counts pairs: for n tokens after c others, `n * (c + n / 2)`."""

    tokens: int
    context_tokens: int = 0
    requests: int = 0
    draft_steps: int = 0
    attended: float = 0.0


def attended(before: int, tokens: int) -> float:
    """Of a prefill chunk of `tokens` after `before` others of its prompt: pairs of a token and one before it."""
    return tokens * (before + 0.5 * tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """One linear piece of the roofline, in seconds per token, context token, request, draft step, and batch."""

    k_tok: float
    k_ctx: float = 0.0
    k_req: float = 0.0
    k_step: float = 0.0
    b: float = 0.0

    def __post_init__(self) -> None:
        for name in ("k_tok", "k_ctx", "k_req", "k_step", "b"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BadModelError(f"coefficient {name} must be finite and not negative, got {value}")


@dataclass(frozen=True, slots=True)
class PerfModel:
    """A replica's fitted model. `margin_s` is a quantile of lateness planned as safety; `r2` is None for presets.

    `attention` is what a token before a prompt token adds to its cost, as a share of that of a token at the start.
    """

    segments: tuple[Segment, ...]
    margin_s: float = 0.0
    r2: float | None = None
    attention: float = 0.0
    rows: tuple[tuple[float, float, float, float, float], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not any(segment.k_tok > 0 for segment in self.segments):
            raise BadModelError("at least one segment must grow with tokens")
        if not (math.isfinite(self.margin_s) and self.margin_s >= 0):
            raise BadModelError(f"margin_s must be finite and not negative, got {self.margin_s}")
        if not (math.isfinite(self.attention) and self.attention >= 0):
            raise BadModelError(f"attention must be finite and not negative, got {self.attention}")
        if self.r2 is not None and not math.isfinite(self.r2):
            raise BadModelError(f"r2 must be finite, got {self.r2}")
        rows = tuple((s.k_tok, s.k_ctx, s.k_req, s.k_step, s.b) for s in self.segments)
        object.__setattr__(self, "rows", rows)

    @property
    def coef(self) -> NDArray[np.float64]:
        """`rows` as the compiled kernels read them; not to be written to."""
        return _coef(self.rows)

    def seconds(self, shape: BatchShape) -> float:
        """Predicted duration of a batch, seconds."""
        work = shape.tokens + self.attention * shape.attended
        return roofline.seconds(self.rows, work, shape.context_tokens, shape.requests, shape.draft_steps)

    def tokens_within(self, seconds: float, context_tokens: int = 0, requests: int = 0, draft_steps: int = 0) -> int:
        """Largest number of tokens whose batch lasts at most `seconds`: the exact inverse of `seconds`, without
        attention.

        `tokens_within(T(n)) == n` wherever T grows at n; on a flat piece, the largest n with the same T.
        0 if not even one token fits, `roofline.MAX_TOKENS` at most.
        """
        return roofline.tokens_within(self.rows, seconds, context_tokens, requests, draft_steps)

    def zero_load_prefill_s(self, tokens: int, chunk: int | None = None) -> float:
        """Time to prefill `tokens` on an idle replica, in batches of `chunk` tokens (None: all in one), seconds."""
        if tokens <= 0:
            return roofline.seconds(self.rows, 1, 0, 1, 0)
        step = tokens if chunk is None else max(1, chunk)
        chunks = [(done, min(step, tokens - done)) for done in range(0, tokens, step)]
        return sum(self.seconds(BatchShape(size, done, 1, 0, attended(done, size))) for done, size in chunks)


@lru_cache(maxsize=64)
def _coef(rows: tuple[tuple[float, float, float, float, float], ...]) -> NDArray[np.float64]:
    return np.array(rows)
