"""Batch times: in flight, observed, and what they do to the model."""

import numpy as np
import pytest

from services.core.perf_model import BatchShape, PerfModel, Segment
from services.worker.step_timer import StepTimer

MODEL = PerfModel((Segment(1e-4, b=0.01),), margin_s=0.002)


def test_batches_in_flight_queue_up_on_the_device() -> None:
    timer = StepTimer(MODEL)
    shape = BatchShape(100)
    assert timer.started(1.0, shape) == pytest.approx(1.02)
    assert timer.started(1.001, shape) == pytest.approx(1.04)
    timer.completed(1.03)
    assert timer.free_at_s == pytest.approx(1.05)


def test_a_batch_on_an_idle_engine_counts_from_its_start() -> None:
    timer = StepTimer(MODEL)
    timer.started(5.0, BatchShape(10))
    timer.completed(5.5)
    assert timer.take_observed() == ((10, 0, 0, 0, 0.0, 0.5),)
    assert timer.take_observed() == ()


def test_a_batch_that_follows_another_counts_from_its_completion() -> None:
    timer = StepTimer(MODEL)
    timer.started(5.0, BatchShape(10))
    timer.completed(5.5)
    timer.set_busy(True)
    timer.started(5.6, BatchShape(20))
    timer.completed(6.0)
    assert [row[5] for row in timer.take_observed()] == [0.5, 0.5]


def test_empty_batches_are_not_observed() -> None:
    timer = StepTimer(MODEL)
    timer.started(5.0, None)
    timer.completed(5.001)
    assert timer.take_observed() == ()


def test_a_slower_machine_is_learnt_and_published() -> None:
    timer = StepTimer(MODEL)
    shape, now_s = BatchShape(100), 0.0
    for _ in range(64):
        timer.started(now_s, shape)
        now_s += 0.03
        timer.completed(now_s)
        timer.set_busy(True)
    assert timer.model is not None
    assert timer.model.seconds(shape) == pytest.approx(0.03, rel=0.05)
    assert timer.take_model() == timer.model
    assert timer.take_model() is None


def test_a_replica_that_starts_on_a_busy_machine_is_known_to_be_slow_after_a_few_batches() -> None:
    timer = StepTimer(MODEL)
    for step in range(10):
        timer.started(step * 1.0, BatchShape(100))
        timer.completed(step * 1.0 + 2 * MODEL.seconds(BatchShape(100)))
    assert timer.model is not None
    assert timer.model.seconds(BatchShape(100)) > 1.6 * MODEL.seconds(BatchShape(100))


def test_the_fitted_margin_holds_until_observations_say_otherwise() -> None:
    timer = StepTimer(MODEL)
    for step in range(16):
        timer.started(step * 0.02, BatchShape(100))
        timer.completed((step + 1) * 0.02)
        timer.set_busy(True)
    assert timer.model is not None
    assert timer.model.margin_s == pytest.approx(0.002, rel=0.2)


def test_without_a_model_batches_are_only_observed() -> None:
    timer = StepTimer(None)
    timer.started(0.0, BatchShape(5))
    timer.completed(0.1)
    assert timer.model is None
    assert len(timer.take_observed()) == 1
    timer.set_model(MODEL)
    assert timer.model == MODEL


def test_the_margin_covers_what_the_batch_before_was_late_as_well() -> None:
    """Two in flight, now two batches late by 10 ms and now two early: of two ends one is late by both."""
    timer = StepTimer(MODEL)
    batch = BatchShape(1000)
    took_s, ended_s = MODEL.seconds(batch), 0.0
    timer.started(0.0, batch)
    for number in range(800):
        timer.set_busy(True)
        timer.started(ended_s, batch)
        ended_s += took_s + (0.01 if number % 4 < 2 else -0.01)
        timer.completed(ended_s)
    assert timer.model is not None
    assert timer.model.seconds(batch) == pytest.approx(took_s, rel=0.02)
    assert 0.012 < timer.model.margin_s < 0.025


def test_a_batch_after_an_empty_one_counts_from_its_own_start() -> None:
    """Two in flight: the empty batch is seen to end only once the next has been launched, which takes its time."""
    timer = StepTimer(MODEL)
    timer.set_busy(True)  # requests wait to be taken in
    timer.started(1.0, None)
    timer.started(1.001, BatchShape(600))
    timer.completed(1.041)  # the empty batch, after 40 ms of launching
    assert timer.free_at_s == pytest.approx(1.071)  # 70 ms since its start
    timer.set_busy(True)
    timer.started(1.042, BatchShape(1))
    timer.completed(1.045)
    assert [(row[0], row[5]) for row in timer.take_observed()] == [(600, pytest.approx(0.044))]


def test_the_last_of_two_batches_in_flight_is_not_observed() -> None:
    """Nothing is launched while it runs, so that a host slower than its device seems faster than it is."""
    timer = StepTimer(MODEL)
    timer.started(1.00, BatchShape(8))
    timer.started(1.01, BatchShape(9))
    timer.completed(1.02)
    timer.set_busy(True)
    timer.started(1.03, BatchShape(10))
    timer.completed(1.04)
    timer.started(1.05, None)
    timer.completed(1.051)
    assert [row[0] for row in timer.take_observed()] == [8, 9]
    timer.completed(1.052)  # the empty one
    timer.set_busy(False)
    timer.started(2.0, BatchShape(11))
    timer.completed(2.5)
    assert [(row[0], row[5]) for row in timer.take_observed()] == [(11, 0.5)]


def test_a_batch_between_empty_ones_is_observed() -> None:
    timer = StepTimer(MODEL)
    timer.started(1.0, None)
    timer.started(1.001, BatchShape(8))
    timer.completed(1.002)
    timer.set_busy(True)
    timer.started(1.003, None)
    timer.completed(1.012)
    assert [(row[0], row[5]) for row in timer.take_observed()] == [(8, pytest.approx(0.011))]


def test_launches_that_take_long_do_not_undo_a_model_that_is_right() -> None:
    """Two in flight, as vLLM's loop runs them: schedule and launch the next, then wait for the one before.

    Launching a prefill takes the host 40 ms, so that the decode before it is seen to end 40 ms late, and the prefill
    itself 1 ms after that.
    """
    prefill, decode = BatchShape(600), BatchShape(8)
    model = PerfModel((Segment(5.9e-5, b=0.0056),), margin_s=0.002)
    timer = StepTimer(model)
    host_s = device_s = 0.0
    in_flight: list[float] = []
    late_s: list[float] = []  # of prefills
    expected: list[tuple[bool, float]] = []
    for step in range(400):
        shape = prefill if step % 3 == 0 else decode
        ends_s = timer.started(host_s, shape)
        expected.append((shape is prefill, ends_s))
        host_s += 0.040 if shape is prefill else 0.001
        device_s = max(device_s + (0.012 if shape is prefill else 0.0056), host_s)
        in_flight.append(device_s)
        if len(in_flight) == 2:
            host_s = max(host_s, in_flight.pop(0))
            timer.completed(host_s)
            timer.set_busy(True)
            is_prefill, ends_s = expected.pop(0)
            late_s += [host_s - ends_s] if is_prefill else []
    assert timer.model is not None
    cycle_s = timer.model.seconds(prefill) + 2 * timer.model.seconds(decode)
    assert cycle_s == pytest.approx(host_s / (400 / 3), rel=0.1)
    assert timer.model.seconds(prefill) > 3 * timer.model.seconds(decode)
    assert np.quantile(late_s[50:], 0.9) <= timer.model.margin_s + 1e-4
    assert timer.model.margin_s > 1e-4
