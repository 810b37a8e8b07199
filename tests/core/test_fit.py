"""Fitting and on-line correction of the performance model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from services.core.errors import BadModelError, NotEnoughSamplesError
from services.core.fit import Sample, fit
from services.core.nnls import solve_nnls
from services.core.perf_model import BatchShape, PerfModel, Segment, attended
from services.core.presets import PRESETS


def sweep(model: PerfModel, noise: float, count: int = 300, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        requests = int(rng.integers(1, 256))
        shape = BatchShape(
            int(rng.integers(1, 3000)), int(rng.integers(0, 800)) * requests, requests, int(rng.integers(0, 6))
        )
        samples.append(Sample(shape, model.seconds(shape) * float(rng.normal(1, noise))))
    return samples


@pytest.mark.parametrize("chosen", PRESETS, ids=lambda p: p.name)
def test_a_noisy_sweep_of_every_preset_is_fitted_above_the_bar(chosen) -> None:
    result = fit(sweep(chosen.model, noise=0.03))
    assert result.r2_heldout >= 0.95
    for tokens in (32, 512, 2048):
        shape = BatchShape(tokens, 10_000, 64, 2)
        assert result.model.seconds(shape) == pytest.approx(chosen.model.seconds(shape), rel=0.05)
    over = [s.seconds - result.model.seconds(s.shape) for s in sweep(chosen.model, noise=0.03, seed=1)]
    assert 0.80 <= float(np.mean(np.array(over) <= result.margin_s)) <= 0.995


def test_attention_within_long_prompts_is_found_and_zero_where_there_is_none() -> None:
    rng = np.random.default_rng(6)
    costly = PerfModel((Segment(3.8e-5, k_ctx=2e-7, k_req=3e-5, b=3e-3),), attention=1.3e-3)
    for truth in (costly, PerfModel(costly.segments)):
        samples = []
        for _ in range(200):
            before, tokens = int(rng.choice((0, 0, 300, 1200))), int(rng.integers(8, 512))
            beside = int(rng.integers(0, 32))
            shape = BatchShape(tokens + beside, before + 200 * beside, 1 + beside, attended=attended(before, tokens))
            samples.append(Sample(shape, truth.seconds(shape) * float(rng.normal(1, 0.03))))
        result = fit(samples)
        assert result.r2_heldout > 0.95
        assert result.model.attention == pytest.approx(truth.attention, rel=0.15, abs=5e-5)


def test_what_a_gpu_leaves_flat_is_not_taken_for_attention() -> None:
    """A roofline: decoding is bound by memory, prefill by arithmetic; one segment would bend with attention."""
    truth = PerfModel((Segment(1e-9, k_ctx=3e-8, b=4.6e-3), Segment(2e-5, b=1e-3)), attention=5e-5)
    rng = np.random.default_rng(3)
    samples = []
    for _ in range(30):
        requests = int(rng.integers(1, 256))
        samples.append(Sample(decoding := BatchShape(requests, 300 * requests, requests), truth.seconds(decoding)))
        before, tokens = int(rng.choice((0, 0, 0, 2000))), round(16 * 512 ** float(rng.random()))
        chunk = BatchShape(tokens, before, 1, attended=attended(before, tokens))
        samples.append(Sample(chunk, truth.seconds(chunk) * float(rng.normal(1, 0.02))))
    result = fit(samples)
    assert result.r2_heldout > 0.99
    assert result.model.attention == pytest.approx(truth.attention, rel=0.3)
    assert result.model.seconds(BatchShape(4000)) == pytest.approx(truth.seconds(BatchShape(4000)), rel=0.05)
    assert result.model.seconds(BatchShape(32, 9600, 32)) == pytest.approx(4.9e-3, rel=0.1)


def test_two_segments_are_found_where_there_are_two_and_one_where_there_is_one() -> None:
    by_name = {p.name: p.model for p in PRESETS}
    assert len(fit(sweep(by_name["r1-qwen-7b-a100"], noise=0.002)).model.segments) == 2
    assert len(fit(sweep(by_name["opt-13b-a100"], noise=0.02)).model.segments) == 1


def test_too_few_uniform_or_impossible_samples_are_refused() -> None:
    with pytest.raises(NotEnoughSamplesError):
        fit([Sample(BatchShape(n), 0.01) for n in range(1, 8)])
    with pytest.raises(NotEnoughSamplesError):
        fit([Sample(BatchShape(64), 0.01 + 1e-4 * i) for i in range(20)])
    with pytest.raises(BadModelError):
        fit([Sample(BatchShape(n), 0.01 if n > 1 else float("nan")) for n in range(1, 20)])


@given(st.integers(0, 10_000))
def test_the_solver_agrees_with_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(12, 5)) * 10.0 ** rng.integers(-4, 4, size=5)
    y = rng.normal(size=12)
    ours, theirs = solve_nnls(a, y), nnls(a, y)[0]
    assert (ours >= 0).all()
    assert np.linalg.norm(a @ ours - y) == pytest.approx(np.linalg.norm(a @ theirs - y), rel=1e-6)
