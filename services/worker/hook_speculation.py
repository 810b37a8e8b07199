"""Speculation lengths in the hook: how many draft tokens each tier verifies, and how many of them are accepted.

The engine drafts as many tokens as it was started with for every request; the hook lets each decoder verify as many of
them as `services.core.speculation` chooses for its tier, and plans batches with the tokens that is expected to yield.
Acceptance is estimated per application from what every step accepted. A draft that was allowed but not proposed (an
n-gram without a match) counts as refused: what the plan needs is how far a step gets, whatever stops it.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from services.core.columns import DecoderColumns, Ints
from services.core.drafts import with_draft_lengths
from services.core.perf_model import PerfModel
from services.core.speculation import AcceptanceEstimator, expected_tokens, fastest_length
from services.core.view import PlanSettings, Prefill

__all__ = ["Speculation"]

_CHOOSE_EVERY = 8  # planned steps; lengths follow the load, not single batches
_PROBE_EVERY = 64  # planned steps; a tier without drafts tries one, or its estimate would never change


class Speculation:
    """Lengths and acceptance of one engine; `max_verify` of 1 is an engine that does not speculate."""

    def __init__(self, max_verify: int) -> None:
        self.max_verify = max_verify
        self.estimator = AcceptanceEstimator()
        self._names: dict[str, int] = {}
        self._planned = 0
        self._settings = PlanSettings()
        self._chosen_for: tuple[PlanSettings, bool] | None = None  # settings, and whether prefills wait

    @property
    def enabled(self) -> bool:
        """Whether the engine drafts tokens at all."""
        return self.max_verify > 1

    @property
    def tokens_per_step(self) -> float:
        """What the best step is expected to yield a decoder."""
        rate = max((self.estimator.rate(name) for name in self._names), default=0.0)
        return expected_tokens(self.max_verify, rate)

    def application(self, name: str) -> int:
        """The number of an application in the table of decoders."""
        return self._names.setdefault(name, len(self._names))

    def settings(
        self,
        settings: PlanSettings,
        model: PerfModel,
        columns: DecoderColumns,
        applications: Ints,
        prefills: Sequence[Prefill],
    ) -> PlanSettings:
        """`settings` with acceptance and verified tokens per tier, for the batch about to be planned."""
        if not self.enabled:
            return settings
        on_tier = [prefill for prefill in prefills if prefill.tier >= 0]
        tiers = 1 + max(int(columns.tier.max(initial=-1)), max((p.tier for p in on_tier), default=-1))
        stale = self._planned % _CHOOSE_EVERY == 0 or len(self._settings.verify_tokens) < tiers
        self._planned += 1
        if stale or self._chosen_for != (settings, bool(on_tier)):
            acceptance = self._acceptance(columns.tier, applications, on_tier, tiers)
            self._settings = self._chosen(replace(settings, acceptance=acceptance), model, columns, on_tier)
            self._chosen_for = settings, bool(on_tier)
        return self._settings

    def observe(self, counts: dict[str, tuple[int, int]]) -> None:
        """What a step verified: tokens judged and tokens accepted, by application."""
        for application, (judged, accepted) in counts.items():
            self.estimator.observe_judged(application, judged, accepted)

    def _acceptance(self, tier: Ints, applications: Ints, prefills: Sequence[Prefill], tiers: int) -> tuple[float, ...]:
        """Mean estimate over what decodes on each tier or is about to; the estimator's prior on an empty one."""
        rates = np.array([self.estimator.rate(name) for name in self._names] or [0.0])
        on_tier = tier >= 0
        sums = np.bincount(tier[on_tier], weights=rates[applications[on_tier]], minlength=tiers)
        numbers = np.bincount(tier[on_tier], minlength=tiers)
        for prefill in prefills:
            sums[prefill.tier] += self.estimator.rate(prefill.application)
            numbers[prefill.tier] += 1
        prior = self.estimator.rate("")
        return tuple(float(s / n) if n else prior for s, n in zip(sums, numbers, strict=True))

    def _chosen(
        self, settings: PlanSettings, model: PerfModel, columns: DecoderColumns, prefills: Sequence[Prefill]
    ) -> PlanSettings:
        on_tier = columns.tier >= 0
        decoders = int(on_tier.sum())
        if prefills or not decoders:
            chosen = with_draft_lengths(settings, model, columns, prefills, self.max_verify)
        else:
            counts = np.bincount(columns.tier[on_tier], minlength=len(settings.acceptance))
            length = fastest_length(
                model,
                decoders,
                float(np.average(settings.acceptance, weights=counts)),
                context_tokens=int(columns.context_tokens[on_tier].sum()),
                max_verify_tokens=self.max_verify,
            )
            chosen = replace(settings, verify_tokens=(length,) * len(settings.acceptance))
        if (self._planned // _CHOOSE_EVERY) % (_PROBE_EVERY // _CHOOSE_EVERY) == 0:
            chosen = replace(chosen, verify_tokens=tuple(max(2, length) for length in chosen.verify_tokens))
        return chosen
