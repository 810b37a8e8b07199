"""How late something tends to be: an upper quantile that neither one accident nor one bad minute carries."""

from services.core.lag import LagEstimate


def test_nothing_known_is_no_lag() -> None:
    assert LagEstimate().seconds(0.0) == 0.0


def test_one_accident_among_few_is_left_out() -> None:
    estimate = LagEstimate()
    for lag_s in (0.004, 0.35, 0.005):
        estimate.observe(1.0, lag_s)
    assert estimate.seconds(1.0) == 0.005


def test_among_many_it_is_what_97_of_100_stayed_below() -> None:
    estimate = LagEstimate()
    for lag_ms in range(1, 102):
        estimate.observe(1.0, lag_ms / 1000)
    assert estimate.seconds(1.0) == 0.098


def test_the_usual_lag_is_reckoned_with_until_enough_is_known() -> None:
    estimate = LagEstimate(prior_s=0.02)
    assert estimate.seconds(1.0) == 0.02
    for _ in range(15):
        estimate.observe(1.0, 0.003)
    assert estimate.seconds(1.0) == 0.02
    estimate.observe(1.0, 0.003)
    assert estimate.seconds(1.0) == 0.003
    assert estimate.seconds(60.0) == 0.02


def test_more_than_the_usual_lag_is_believed_at_once() -> None:
    estimate = LagEstimate(prior_s=0.02)
    estimate.observe(1.0, 0.05)
    assert estimate.seconds(1.0) == 0.05


def test_a_bad_minute_is_forgotten() -> None:
    estimate = LagEstimate()
    for _ in range(5):
        estimate.observe(1.0, 0.5)
    assert estimate.seconds(30.0) == 0.5
    assert estimate.seconds(32.0) == 0.0


def test_what_came_early_counts_as_in_time() -> None:
    estimate = LagEstimate()
    estimate.observe(1.0, -0.2)
    assert estimate.seconds(1.0) == 0.0


def test_two_of_the_latest_are_enough_for_one_that_is_alert() -> None:
    calm, alert = LagEstimate(), LagEstimate(alert=True)
    for estimate in (calm, alert):
        for number in range(250):
            estimate.observe(1.0 + number / 100, 0.01)
        estimate.observe(3.51, 0.2)
    assert (calm.seconds(3.52), alert.seconds(3.52)) == (0.01, 0.01)  # one is an accident
    for estimate in (calm, alert):
        estimate.observe(3.53, 0.1)
    assert (calm.seconds(3.54), alert.seconds(3.54)) == (0.01, 0.1)
    assert alert.seconds(4.6) == 0.01  # no longer the latest
