"""Draft lengths for a replica: `speculation.choose_lengths` for what runs there and what is about to."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.core.columns import DecoderColumns
from services.core.perf_model import PerfModel
from services.core.speculation import MAX_VERIFY_TOKENS, choose_lengths
from services.core.view import PlanSettings, Prefill

__all__ = ["with_draft_lengths"]


def with_draft_lengths(
    settings: PlanSettings,
    model: PerfModel,
    columns: DecoderColumns,
    prefills: Sequence[Prefill],
    max_verify_tokens: int = MAX_VERIFY_TOKENS,
) -> PlanSettings:
    """Settings that verify the best number of tokens per tier once `prefills` decode beside the running requests.

    Unchanged where lengths are set already, or acceptance rates are not known.
    """
    if settings.verify_tokens or not settings.acceptance:
        return settings
    tiers = max([len(settings.acceptance), int(columns.tier.max(initial=-1)) + 1, *(p.tier + 1 for p in prefills)])
    counts = np.bincount(columns.tier[columns.tier >= 0], minlength=tiers)
    tpots_s = np.full(tiers, np.inf)
    np.minimum.at(tpots_s, columns.tier[columns.tier >= 0], columns.tpot_s[columns.tier >= 0])
    for prefill in prefills:
        counts[prefill.tier] += 1
        tpots_s[prefill.tier] = min(tpots_s[prefill.tier], prefill.tpot_s)
    chosen = choose_lengths(
        model,
        counts.tolist(),
        tpots_s.tolist(),
        [settings.acceptance_rate(tier) for tier in range(tiers)],
        cap_s=max(settings.caps_s),
        context_tokens=int(columns.context_tokens[columns.tier >= 0].sum()),
        max_verify_tokens=max_verify_tokens,
    )
    return replace(settings, verify_tokens=chosen.verify_tokens)
