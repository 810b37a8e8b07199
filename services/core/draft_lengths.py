"""Speculation length per tier: how many tokens each step verifies for a decoder.

A tier keeps its pace while period <= yield(n) * TPOT (`services.core.speculation`), so longer drafts allow longer
batches, which carry more prefill; but each verified token takes the place of a prefill token. `choose_lengths` picks
the lengths that maximise prefill tokens per second, `fastest_length` the one for batches without prefill.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.core.columns import Floats, Ints
from services.core.compiled import compiled, expected_tokens, seconds, tokens_within
from services.core.perf_model import PerfModel
from services.core.roofline import MAX_TOKENS
from services.core.speculation import MAX_VERIFY_TOKENS

__all__ = ["LengthChoice", "choose_lengths", "fastest_length"]


@dataclass(frozen=True, slots=True)
class LengthChoice:
    """Verified tokens per tier, the batch period they allow, and the prefill rate that leaves, tokens/s.

    A negative rate means that not even the decoders fit.
    """

    verify_tokens: tuple[int, ...]
    period_s: float
    prefill_tokens_per_s: float


def choose_lengths(
    model: PerfModel,
    decoders: Sequence[int],
    tpots_s: Sequence[float],
    acceptance: Sequence[float],
    *,
    cap_s: float,
    context_tokens: int = 0,
    max_verify_tokens: int = MAX_VERIFY_TOKENS,
    max_batch_tokens: int = MAX_TOKENS,
) -> LengthChoice:
    """The lengths with the highest prefill rate for `decoders[t]` running requests per tier.

    A batch holds at most `max_batch_tokens`, verified tokens included.
    """
    tiers = _tiers(decoders, tpots_s, acceptance)
    lengths, period_s, rate = _best_lengths(
        model.coef, *tiers, cap_s, float(context_tokens), max_verify_tokens, max_batch_tokens
    )
    return LengthChoice(tuple(lengths.tolist()), period_s, rate)


def fastest_length(
    model: PerfModel,
    decoders: Sequence[int],
    tpots_s: Sequence[float],
    acceptance: Sequence[float],
    *,
    context_tokens: int = 0,
    max_verify_tokens: int = MAX_VERIFY_TOKENS,
    max_batch_tokens: int = MAX_TOKENS,
) -> int:
    """The length for all at which `decoders[t]` requests per tier alone produce most tokens per second.

    For batches without prefill. Only lengths count at which every tier keeps its pace; 0 where there is none.
    """
    tiers = _tiers(decoders, tpots_s, acceptance)
    return _fastest_length(model.coef, *tiers, float(context_tokens), max_verify_tokens, max_batch_tokens)


def _tiers(
    decoders: Sequence[int], tpots_s: Sequence[float], acceptance: Sequence[float]
) -> tuple[Ints, Floats, Floats]:
    return np.array(decoders, np.int64), np.array(tpots_s, np.float64), np.array(acceptance, np.float64)


@compiled
def _best_lengths(
    coef: Floats,
    decoders: Ints,
    tpots_s: Floats,
    acceptance: Floats,
    cap_s: float,
    context_tokens: float,
    max_verify_tokens: int,
    max_batch_tokens: int,
) -> tuple[Ints, float, float]:
    """Lengths per tier, their period and their prefill rate.

    Only periods at which some populated tier is exactly on pace (or the cap) can be optimal: between two of them a
    longer batch costs no extra draft token. For each, every tier takes the shortest length that keeps its pace.
    """
    tiers = decoders.shape[0]
    paces_s = np.empty((tiers, max_verify_tokens))
    periods = np.full(1 + tiers * max_verify_tokens, cap_s)
    for t in range(tiers):
        for n in range(max_verify_tokens):
            paces_s[t, n] = expected_tokens(n + 1, acceptance[t]) * tpots_s[t]
            if decoders[t] > 0:
                periods[1 + t * max_verify_tokens + n] = min(paces_s[t, n], cap_s)
    periods.sort()
    requests = decoders.sum()
    lengths = np.ones(tiers, np.int64)
    best = lengths.copy()
    best_period_s = best_rate = -np.inf
    for i in range(periods.shape[0]):
        period_s = periods[i]
        if i > 0 and period_s == periods[i - 1]:
            continue
        tokens = 0
        draft_steps = 0
        possible = True
        for t in range(tiers):
            if decoders[t] == 0:
                continue
            n = 0
            while n < max_verify_tokens and paces_s[t, n] < period_s - 1e-12:
                n += 1
            possible = possible and n < max_verify_tokens
            lengths[t] = n + 1
            tokens += decoders[t] * (n + 1)
            draft_steps = max(draft_steps, n)
        if not possible:
            continue
        within = tokens_within(coef, period_s, context_tokens, requests + 1, draft_steps)
        room = min(within, max_batch_tokens) - tokens
        alone_s = seconds(coef, tokens, context_tokens, requests, draft_steps)
        if room < 0 and tokens <= max_batch_tokens and alone_s <= period_s + 1e-9:
            room = 0
        if room / period_s > best_rate:
            best[:] = lengths
            best_period_s, best_rate = period_s, room / period_s
    return best, best_period_s, best_rate


@compiled
def _fastest_length(
    coef: Floats,
    decoders: Ints,
    tpots_s: Floats,
    acceptance: Floats,
    context_tokens: float,
    max_verify_tokens: int,
    max_batch_tokens: int,
) -> int:
    requests = decoders.sum()
    fastest = 0
    best = 0.0
    for length in range(1, max_verify_tokens + 1):
        batch_s = seconds(coef, requests * length, context_tokens, requests, length - 1)
        keeps_pace = requests * length <= max_batch_tokens
        tokens = 0.0
        for t in range(decoders.shape[0]):
            if decoders[t] > 0:
                expected = expected_tokens(length, acceptance[t])
                keeps_pace = keeps_pace and batch_s <= expected * tpots_s[t]
                tokens += decoders[t] * expected
        if keeps_pace and tokens / batch_s > best:
            fastest = length
            best = tokens / batch_s
    return fastest
