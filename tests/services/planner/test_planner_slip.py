"""How much later than planned a candidate reaches the engine, by where the engine stands in its batches."""

import math

import pytest

from services.planner.slip import TransitEstimate, slip_s


def test_a_system_that_was_just_started_reckons_with_the_usual_transit() -> None:
    transit = TransitEstimate()
    assert transit.seconds(10.0) == 0.02
    for _ in range(16):
        transit.observe(10.0, 0.008)
    assert transit.seconds(10.0) == 0.008


@pytest.mark.parametrize(
    ("free_s", "later_s"),
    [
        (10.050, 0.0),  # it arrives while the engine still runs its batch
        (10.010, 0.0),  # just in time
        (10.004, 0.100),  # the next batch is formed without it
        (9.996, 0.096),  # formed already, which the planner has not been told
        (9.896, 0.096),  # and one before that
        (-math.inf, 0.010),  # no batch was ever reported
    ],
)
def test_a_candidate_waits_for_the_first_batch_that_is_formed_after_its_arrival(free_s, later_s) -> None:
    assert slip_s(10.0, free_s, 0.010, 0.100) == pytest.approx(later_s)


def test_with_two_batches_in_flight_the_next_is_formed_one_batch_sooner() -> None:
    assert slip_s(10.0, 10.150, 0.010, 0.100, 2) == pytest.approx(0.0)
    assert slip_s(10.0, 10.105, 0.010, 0.100, 2) == pytest.approx(0.100)


def test_the_start_it_comes_to_is_after_its_arrival_and_less_than_a_batch_later() -> None:
    for free_ms in range(-500, 60):
        free_s = 10.0 + free_ms / 1000
        start_s = max(10.0, free_s) + slip_s(10.0, free_s, 0.010, 0.030)
        assert start_s >= 10.010 - 1e-9
        assert start_s < max(10.010, free_s) + 0.030 + 1e-9


def late(transit: TransitEstimate, now_s: float, lag_s: float = 0.3, times: int = 4) -> None:
    for _ in range(times):
        transit.observe(now_s, lag_s)


def test_an_estimate_that_turns_everybody_away_falls_back_to_the_usual() -> None:
    transit = TransitEstimate()
    late(transit, 10.0)
    transit.turned_away(10.5)
    transit.turned_away(11.0)
    assert transit.seconds(11.5) == 0.3  # what arrives within a second may still confirm it
    assert transit.seconds(12.5) == pytest.approx(0.02 + 0.28 / 2)
    assert transit.seconds(15.5) == pytest.approx(0.02 + 0.28 / 16)


def test_what_arrives_after_the_doubt_counts_alone() -> None:
    transit = TransitEstimate()
    late(transit, 10.0)
    transit.turned_away(10.0)
    transit.observe(13.0, 0.03)
    assert transit.seconds(13.0) == 0.03


def test_what_arrives_in_time_leaves_no_doubt() -> None:
    transit = TransitEstimate()
    late(transit, 10.0)
    transit.turned_away(10.0)
    transit.observe(10.5, 0.3)
    assert transit.seconds(15.0) == 0.3


def test_an_estimate_that_turned_nobody_away_is_kept() -> None:
    transit = TransitEstimate()
    late(transit, 10.0)
    assert transit.seconds(25.0) == 0.3
