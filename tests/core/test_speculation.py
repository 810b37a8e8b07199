"""Draft lengths per tier and the acceptance estimate behind them."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.admission import Policy, decide
from services.core.draft_lengths import choose_lengths
from services.core.presets import preset
from services.core.speculation import AcceptanceEstimator, expected_tokens
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

MODEL = preset("opt-13b-a100").model


def test_expected_tokens_follow_the_geometric_series() -> None:
    assert expected_tokens(1, 0.7) == pytest.approx(1.0)
    assert expected_tokens(4, 0.5) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(5, 1.0) == 5.0
    assert expected_tokens(5, 0.0) == 1.0


def rate_of(lengths: tuple[int, ...], counts: list[int], tpots: list[float], acceptance: list[float]) -> float:
    """Prefill rate with given lengths at the longest period they keep."""
    populated = [t for t, count in enumerate(counts) if count]
    period = min([0.3, *(expected_tokens(lengths[t], acceptance[t]) * tpots[t] for t in populated)])
    draft = max((lengths[t] - 1 for t in populated), default=0)
    tokens = sum(counts[t] * lengths[t] for t in populated)
    return (MODEL.tokens_within(period, 0, sum(counts) + 1, draft) - tokens) / period


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=2),
    st.lists(st.floats(0.05, 0.95), min_size=2, max_size=2),
)
def test_chosen_lengths_equal_the_best_of_all_combinations(counts: list[int], acceptance: list[float]) -> None:
    tpots = [0.05, 0.1]
    chosen = choose_lengths(MODEL, counts, tpots, acceptance, cap_s=0.3)
    best = max(rate_of(lengths, counts, tpots, acceptance) for lengths in product(range(1, 11), repeat=2))
    assert chosen.prefill_tokens_per_s == pytest.approx(best, rel=0.01, abs=30)
    for tier, count in enumerate(counts):
        if count:
            pace_s = expected_tokens(chosen.verify_tokens[tier], acceptance[tier]) * tpots[tier]
            assert chosen.period_s <= pace_s + 1e-9


def test_the_tighter_tier_drafts_more() -> None:
    chosen = choose_lengths(MODEL, [20, 20], [0.05, 0.1], [0.8, 0.8], cap_s=0.3)
    assert chosen.verify_tokens[0] > chosen.verify_tokens[1]
    plain = choose_lengths(MODEL, [20, 20], [0.05, 0.1], [0.0, 0.0], cap_s=0.3)
    assert plain.verify_tokens == (1, 1)
    assert chosen.prefill_tokens_per_s > 1.3 * plain.prefill_tokens_per_s


def test_acceptance_is_learned_per_application() -> None:
    rng = np.random.default_rng(5)
    estimator = AcceptanceEstimator()
    for _ in range(600):
        for application, rate in (("coder", 0.8), ("chatbot", 0.4)):
            accepted = 0
            while accepted < 5 and rng.random() < rate:
                accepted += 1
            estimator.observe(application, 5, accepted)
    assert estimator.rate("coder") == pytest.approx(0.8, abs=0.07)
    assert estimator.rate("chatbot") == pytest.approx(0.4, abs=0.07)
    assert estimator.rate("unknown") == pytest.approx(0.6)


def test_decisions_choose_draft_lengths_where_only_acceptance_is_known() -> None:
    decoders = tuple(Decoder(f"d{i}", i % 2, 0.05 + 0.05 * (i % 2), 0.05 + 0.05 * (i % 2), 200, 100) for i in range(40))
    view = ReplicaView(0.0, MODEL, decoders, (), 8000, 9000)
    burst = [Prefill(f"c{i}", 0, 0.6 + 0.05 * i, 0.05, 900, output_tokens=80) for i in range(8)]
    plain = decide(view, burst, Policy.MH, PlanSettings())
    drafting = decide(view, burst, Policy.MH, PlanSettings(acceptance=(0.8, 0.8)))
    assert plain.verify_tokens == ()
    assert drafting.verify_tokens[0] > drafting.verify_tokens[1] >= 1
    assert drafting.kept_weight > plain.kept_weight
    fixed = decide(view, burst, Policy.MH, PlanSettings(acceptance=(0.8, 0.8), verify_tokens=(2, 1)))
    assert fixed.verify_tokens == (2, 1)
