"""Following a replica that has become slower, and how much its long batches vary."""

import numpy as np
import pytest

from services.core.correction import OnlineCorrection
from services.core.perf_model import BatchShape, PerfModel, Segment

MODEL = PerfModel((Segment(5e-5, k_ctx=1e-8, b=0.004), Segment(6e-5, b=0.001)), margin_s=0.001, attention=1e-3)
SHORT, LONG = BatchShape(8, 800, 8), BatchShape(900, 0, 1)


def take(correction: OnlineCorrection, shape: BatchShape, seconds: float) -> None:
    """A batch with no other in flight."""
    late_s = seconds - correction.applied().seconds(shape)
    correction.observe([shape], seconds)
    correction.ended(shape, late_s)


def test_a_slower_machine_and_its_noise_are_learnt() -> None:
    rng = np.random.default_rng(3)
    correction = OnlineCorrection(MODEL)
    for _ in range(1500):
        for shape in (SHORT, LONG):
            take(correction, shape, MODEL.seconds(shape) * 1.2 + float(rng.normal(0, 0.0005)))
    assert correction.scale == pytest.approx(1.2, rel=0.02)
    assert correction.offset_s == pytest.approx(0.0, abs=0.0003)
    assert correction.margin_s == pytest.approx(1.645 * 0.0005, rel=0.5)
    for shape in (SHORT, LONG, BatchShape(2000)):
        assert correction.applied().seconds(shape) == pytest.approx(1.2 * MODEL.seconds(shape), rel=0.02)
    assert correction.applied().attention == MODEL.attention


def test_time_lost_between_batches_is_no_slower_machine() -> None:
    correction = OnlineCorrection(MODEL)
    for _ in range(300):
        for shape in (*[SHORT] * 10, LONG):
            correction.observe([shape], MODEL.seconds(shape) + 0.003)
    assert correction.offset_s == pytest.approx(0.003, rel=0.1)
    for shape in (SHORT, LONG, BatchShape(400)):
        assert correction.applied().seconds(shape) == pytest.approx(MODEL.seconds(shape) + 0.003, rel=0.02)


def test_while_all_batches_are_alike_they_are_predicted_right() -> None:
    correction = OnlineCorrection(MODEL)
    for _ in range(200):
        correction.observe([SHORT], 2 * MODEL.seconds(SHORT))
    assert correction.applied().seconds(SHORT) == pytest.approx(2 * MODEL.seconds(SHORT), rel=0.02)
    assert 1 < correction.scale < 2
    assert correction.offset_s > 0


def test_the_margin_is_that_of_long_batches_however_many_short_ones_there_are() -> None:
    rng = np.random.default_rng(4)
    correction = OnlineCorrection(MODEL)
    exceeded = []
    for _ in range(400):
        for _ in range(30):
            take(correction, SHORT, MODEL.seconds(SHORT) + float(rng.normal(0, 0.0002)))
        observed_s = MODEL.seconds(LONG) + float(rng.normal(0, 0.004))
        exceeded.append(observed_s > correction.applied().seconds(LONG) + correction.margin_s)
        take(correction, LONG, observed_s)
    assert 0.004 < correction.margin_s < 0.012  # 1.645 x 4 ms = 6.6 ms
    assert 0.01 < np.mean(exceeded[50:]) < 0.12


def test_the_margin_follows_when_batches_become_short_for_good() -> None:
    rng = np.random.default_rng(5)
    correction = OnlineCorrection(MODEL)
    for _ in range(200):
        take(correction, LONG, MODEL.seconds(LONG) + float(rng.normal(0, 0.01)))
    assert correction.margin_s > 0.01
    for _ in range(20_000):
        take(correction, SHORT, MODEL.seconds(SHORT) + float(rng.normal(0, 0.0005)))
    assert correction.margin_s < 0.0015


def test_one_paused_step_does_not_ruin_the_correction() -> None:
    correction = OnlineCorrection(MODEL)
    for _ in range(500):
        take(correction, LONG, MODEL.seconds(LONG))
    take(correction, LONG, 60.0)
    assert correction.applied().seconds(LONG) < 1.1 * MODEL.seconds(LONG)
    take(correction, LONG, float("nan"))
    assert correction.steps == 501


def test_a_cold_first_batch_is_not_believed_and_several_are() -> None:
    correction = OnlineCorrection(MODEL)
    take(correction, LONG, 2.5 * MODEL.seconds(LONG))
    assert correction.applied().seconds(LONG) < 1.6 * MODEL.seconds(LONG)
    assert correction.margin_s < 3 * MODEL.margin_s
    for _ in range(12):
        take(correction, LONG, 2.5 * MODEL.seconds(LONG))
    assert correction.applied().seconds(LONG) > 2.1 * MODEL.seconds(LONG)


def test_a_faster_machine_never_gets_negative_coefficients() -> None:
    correction = OnlineCorrection(MODEL)
    for _ in range(300):
        correction.observe([SHORT], 1e-6)
        correction.observe([LONG], 0.02)
    assert all(value >= 0 for row in correction.applied().rows for value in row)


def test_batches_together_teach_what_each_would_have_taught_alone() -> None:
    """Slower by a quarter and 2 ms per batch; stretches are of unlike batches, and now one prevails, now the other."""
    alone, together = OnlineCorrection(MODEL), OnlineCorrection(MODEL)
    for step in range(400):
        stretch = [SHORT] * (step % 5) + [LONG] * (4 - step % 5)
        seconds = [1.25 * MODEL.seconds(shape) + 0.002 for shape in stretch]
        for shape, took_s in zip(stretch, seconds, strict=True):
            alone.observe([shape], took_s)
        together.observe(stretch, sum(seconds))
    for correction in (alone, together):
        assert correction.scale == pytest.approx(1.25, rel=0.03)
        assert correction.offset_s == pytest.approx(0.002, abs=0.0006)
    assert together.steps == alone.steps == 1600
