"""Drafts in a plan: what they are worth by tier, how many tokens each tier verifies, and who is late with them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.core.columns import DecoderColumns, Floats, Ints
from services.core.draft_lengths import choose_lengths, fastest_length
from services.core.perf_model import PerfModel
from services.core.problem import Problem
from services.core.view import PlanSettings, Prefill

__all__ = ["acceptance_by_tier", "late_decoders", "with_draft_lengths", "without_drafts"]


def acceptance_by_tier(tier: Ints, rates: Floats, tiers: int, otherwise: float) -> tuple[float, ...]:
    """Mean of `rates` over the requests of each of `tiers` tiers; `otherwise` on an empty one.

    `tier` and `rates` have one entry per request; those of tier -1 do not count.
    """
    on_tier = tier >= 0
    sums = np.bincount(tier[on_tier], weights=rates[on_tier], minlength=tiers)
    numbers = np.bincount(tier[on_tier], minlength=tiers)
    return tuple(float(s / n) if n else otherwise for s, n in zip(sums, numbers, strict=True))


def with_draft_lengths(
    settings: PlanSettings, model: PerfModel, columns: DecoderColumns, prefills: Sequence[Prefill]
) -> PlanSettings:
    """Settings that verify the best number of tokens per tier once `prefills` decode beside the running requests.

    Without prefills, those that decode fastest. Unchanged where lengths are set already, or acceptance rates are not
    known.
    """
    if settings.verify_tokens or not settings.acceptance:
        return settings
    running = columns.on_tier
    tiers = max([len(settings.acceptance), len(running.numbers), *(p.tier + 1 for p in prefills)])
    empty = tiers - len(running.numbers)
    decoders, tpots_s = [*running.numbers, *[0] * empty], [*running.tpots_s, *[math.inf] * empty]
    for prefill in prefills:
        decoders[prefill.tier] += 1
        if prefill.tpot_s < tpots_s[prefill.tier]:
            tpots_s[prefill.tier] = prefill.tpot_s
    acceptance = [settings.acceptance_rate(tier) for tier in range(tiers)]
    context_tokens = running.context_tokens
    if not prefills and running.number:
        length = fastest_length(
            model,
            decoders,
            tpots_s,
            acceptance,
            context_tokens=context_tokens,
            max_verify_tokens=settings.max_verify_tokens,
            max_batch_tokens=settings.max_batch_tokens,
        )
        if length:
            lengths = tuple(length if rate > 0 else 1 for rate in acceptance)  # drafts in vain would only take memory
            return replace(settings, verify_tokens=lengths)
    chosen = choose_lengths(
        model,
        decoders,
        tpots_s,
        acceptance,
        cap_s=max(settings.caps_s),
        context_tokens=context_tokens,
        max_verify_tokens=settings.max_verify_tokens,
        max_batch_tokens=settings.max_batch_tokens,
    )
    return replace(settings, verify_tokens=chosen.verify_tokens)


def without_drafts(settings: PlanSettings) -> PlanSettings:
    """The same settings with plain decoding on every tier, whatever the acceptance."""
    tiers = max(len(settings.verify_tokens), len(settings.acceptance))
    return replace(settings, verify_tokens=(1,) * tiers)


def late_decoders(problem: Problem) -> int:
    """Decoders on tiers that are late even if the next batch holds nothing but decoders and their drafts."""
    tiers = len(problem.tiers.tpot)
    return int(problem.base.number[tiers:, 0].sum())
