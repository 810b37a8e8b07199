"""What pausing decoders is worth, and which may be paused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.columns import DecoderColumns, columns_of
from services.core.pausing import PauseRule, lead_s, overcommitment, pace_s, pausable_rows
from services.core.perf_model import PerfModel, Segment
from services.core.view import Decoder

MODEL = PerfModel((Segment(7e-5, 0.0, 0.0, 0.0, 0.025),))
RULE = PauseRule()
CAP_S = 0.1
NOW_S = 1000.0


def decoders(
    *ahead_s: float, remaining: int = 4000, context: int = 1000, tpot_s: float = 0.05, tier: int = 0
) -> DecoderColumns:
    return columns_of(
        [Decoder(f"d{n}", tier, NOW_S + ahead, tpot_s, context, remaining) for n, ahead in enumerate(ahead_s)]
    )


def pausable(columns: DecoderColumns, pace: float = 0.025) -> list[int]:
    return pausable_rows(columns, NOW_S, MODEL, CAP_S, pace, RULE)


def test_the_furthest_ahead_is_paused_first_and_nobody_who_is_due_soon() -> None:
    assert pausable(decoders(5.0, 40.0, 20.0, -1.0)) == [1, 2]


def test_a_pause_ends_early_enough_to_compute_the_context_again() -> None:
    lead = float(lead_s(MODEL, np.array([1000]), CAP_S)[0])
    ahead = RULE.least_s + lead
    assert pausable(decoders(ahead + 1e-6)) == [0]
    assert pausable(decoders(ahead - 1e-6)) == []
    assert lead > MODEL.zero_load_prefill_s(1000) + 2 * CAP_S


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"remaining": 100}, "it ends soon by itself"),
        ({"tier": -1}, "best effort is preempted anyway"),
    ],
)
def test_who_is_never_paused(changed: dict[str, int], why: str) -> None:
    assert pausable(decoders(60.0, **changed)) == [], why


def test_half_the_pace_is_worth_nearly_twice_the_memory() -> None:
    columns = decoders(0.0, 0.0)
    assert overcommitment(columns, NOW_S, 0.025, RULE) == pytest.approx(1 + RULE.share * (0.05 / 0.025 - 1))


def test_what_decoders_are_ahead_by_is_worth_more() -> None:
    """4000 tokens at 25 ms take 100 s; the deadlines leave 200 s, or 250 s to one that is 50 s ahead."""
    columns = decoders(50.0)
    assert overcommitment(columns, NOW_S, 0.025, RULE) == pytest.approx(1 + RULE.share * (250 / 100 - 1))


def test_short_outputs_are_worth_nothing() -> None:
    assert overcommitment(decoders(60.0, remaining=100), NOW_S, 0.025, RULE) == 1.0
    assert overcommitment(columns_of([]), NOW_S, 0.025, RULE) == 1.0


@given(
    st.lists(st.tuples(st.floats(-10, 500), st.integers(1, 9000), st.integers(1, 9000)), min_size=1, max_size=20),
    st.floats(0.005, 0.2),
)
def test_the_memory_promised_is_bounded_and_never_less_than_there_is(
    rows: list[tuple[float, int, int]], pace: float
) -> None:
    columns = columns_of(
        [Decoder(f"d{n}", 0, NOW_S + ahead, 0.05, context, left) for n, (ahead, context, left) in enumerate(rows)]
    )
    times = overcommitment(columns, NOW_S, pace, RULE)
    assert 1.0 <= times <= 1 + RULE.share * (RULE.most - 1)


@given(st.floats(0.005, 0.045))
def test_paused_in_turns_everybody_keeps_the_pace(pace: float) -> None:
    """The claim behind `overcommitment`, executed: a fluid of equal requests that takes the least ahead first."""
    number, remaining, tpot_s = 60, 4000, 0.05
    columns = decoders(*[0.0] * number, remaining=remaining, context=1, tpot_s=tpot_s)
    times = overcommitment(columns, NOW_S, pace, PauseRule(share=1.0, least_s=1.0, most=1000.0))
    at_once = int(np.ceil(number / times))
    ahead = np.zeros(number)
    for _ in range(2000):
        running = np.argsort(ahead, kind="stable")[:at_once]
        ahead -= pace
        ahead[running] += tpot_s
        assert ahead.min() >= -number * tpot_s


def test_pace_is_that_of_a_batch_of_decoders() -> None:
    assert 0.025 < pace_s(MODEL, 50, 100_000) < 0.035
