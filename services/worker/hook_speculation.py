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
from services.core.drafts import acceptance_by_tier, with_draft_lengths
from services.core.perf_model import PerfModel
from services.core.speculation import PRIOR_ACCEPTANCE, AcceptanceEstimator, expected_tokens
from services.core.view import PlanSettings, Prefill

__all__ = ["Speculation"]

_CHOOSE_EVERY = 8  # planned steps; lengths follow the load, not single batches
_PROBE_EVERY = 64  # planned steps; a tier without drafts tries one, or its estimate would never change
_PUBLISH_CHANGE = 0.02  # of an acceptance rate; less changes no plan


class Speculation:
    """Lengths and acceptance of one engine; `max_verify` of 1 is an engine that does not speculate."""

    def __init__(self, max_verify: int) -> None:
        self.max_verify = max_verify
        self.estimator = AcceptanceEstimator()
        self._names: dict[str, int] = {}
        self._planned = 0
        self._settings = PlanSettings()
        self._chosen_for: tuple[PlanSettings, bool] | None = None  # settings, and whether prefills wait
        self._published: dict[str, float] = {}

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
            drafting = replace(settings, acceptance=acceptance, max_verify_tokens=self.max_verify)
            self._settings = self._probing(with_draft_lengths(drafting, model, columns, on_tier))
            self._chosen_for = settings, bool(on_tier)
        return self._settings

    def observe(self, counts: dict[str, tuple[int, int]]) -> None:
        """What a step verified: tokens judged and tokens accepted, by application."""
        for application, (judged, accepted) in counts.items():
            self.estimator.observe_judged(application, judged, accepted)

    def take_acceptance(self) -> dict[str, float] | None:
        """The estimate per application, if one changed by more than a little since the last call."""
        rates, published = self.estimator.rates, self._published
        known = rates.keys() == published.keys()
        if known and all(abs(rates[name] - published[name]) < _PUBLISH_CHANGE for name in rates):
            return None
        self._published = rates
        return rates

    def _acceptance(self, tier: Ints, applications: Ints, prefills: Sequence[Prefill], tiers: int) -> tuple[float, ...]:
        """Mean estimate over what decodes on each tier or is about to; the prior on an empty one."""
        rates = np.array([self.estimator.rate(name) for name in self._names] or [0.0])
        waiting = [self.estimator.rate(prefill.application) for prefill in prefills]
        return acceptance_by_tier(
            np.concatenate([tier, np.array([prefill.tier for prefill in prefills], np.int64)]),
            np.concatenate([rates[applications], np.array(waiting, np.float64)]),
            tiers,
            PRIOR_ACCEPTANCE,
        )

    def _probing(self, chosen: PlanSettings) -> PlanSettings:
        """The chosen lengths; now and then with a draft for every tier."""
        if (self._planned // _CHOOSE_EVERY) % (_PROBE_EVERY // _CHOOSE_EVERY) == 0:
            return replace(chosen, verify_tokens=tuple(max(2, length) for length in chosen.verify_tokens))
        return chosen
