from services.planner.slip import SlipEstimate


def test_nothing_seen_is_no_slip() -> None:
    assert SlipEstimate().seconds(10.0) == 0.0


def test_it_is_an_upper_quantile_and_never_negative() -> None:
    slip = SlipEstimate()
    for tenth in range(10):
        slip.observe(10.0, tenth / 10)
    assert slip.seconds(10.0) == 0.8
    early = SlipEstimate()
    early.observe(10.0, -0.5)
    assert early.seconds(10.0) == 0.0


def test_one_bad_minute_is_forgotten() -> None:
    slip = SlipEstimate()
    slip.observe(10.0, 5.0)
    assert slip.seconds(39.0) == 5.0
    assert slip.seconds(41.0) == 0.0
