"""How late something tends to be: an upper quantile that neither one accident nor one bad minute carries."""

from services.core.lag import LagEstimate


def test_nothing_known_is_no_lag() -> None:
    assert LagEstimate().seconds(0.0) == 0.0


def test_one_accident_among_few_is_left_out() -> None:
    estimate = LagEstimate()
    for lag_s in (0.004, 0.35, 0.005):
        estimate.observe(1.0, lag_s)
    assert estimate.seconds(1.0) == 0.005


def test_among_many_it_is_the_ninth_decile() -> None:
    estimate = LagEstimate()
    for lag_ms in range(1, 52):
        estimate.observe(1.0, lag_ms / 1000)
    assert estimate.seconds(1.0) == 0.046


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
