"""The roofline model and its exact inverse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import BadModelError
from services.core.perf_model import BatchShape, PerfModel, Segment
from services.core.presets import PRESETS, UnknownPresetError, preset

coefficients = st.floats(0, 1e-3)
growing = st.builds(Segment, st.floats(1e-7, 1e-3), coefficients, coefficients, coefficients, st.floats(0, 0.1))
flat = st.builds(Segment, st.just(0.0), coefficients, coefficients, coefficients, st.floats(0, 0.1))
models = st.builds(lambda one, more: PerfModel((one, *more)), growing, st.lists(st.one_of(growing, flat), max_size=2))


@given(models, st.integers(0, 50_000), st.integers(0, 100_000), st.integers(0, 512), st.integers(0, 9))
def test_tokens_within_is_the_exact_inverse(model: PerfModel, n: int, context: int, requests: int, steps: int) -> None:
    seconds = model.seconds(BatchShape(n, context, requests, steps))
    found = model.tokens_within(seconds, context, requests, steps)
    assert found >= n
    assert model.seconds(BatchShape(found, context, requests, steps)) <= seconds
    assert model.seconds(BatchShape(found + 1, context, requests, steps)) > seconds
    if model.seconds(BatchShape(n + 1, context, requests, steps)) > seconds:
        assert found == n


@given(models, st.floats(0, 1), st.integers(0, 100_000), st.integers(0, 512))
def test_no_batch_of_tokens_within_lasts_longer(model: PerfModel, limit: float, context: int, requests: int) -> None:
    found = model.tokens_within(limit, context, requests)
    assert found == 0 or model.seconds(BatchShape(found, context, requests)) <= limit


@pytest.mark.parametrize("chosen", PRESETS, ids=lambda p: p.name)
def test_every_preset_inverts_and_has_memory_for_a_long_request(chosen) -> None:
    for n in (300, 1000, 8192):
        assert chosen.model.tokens_within(chosen.model.seconds(BatchShape(n))) == n
    assert chosen.kv_blocks * chosen.block_size > chosen.max_model_len


def test_opt_6_7b_has_the_published_coefficients_and_blocks() -> None:
    chosen = preset("opt-6.7b-a100")
    assert chosen.kv_blocks == 7000
    assert chosen.model.seconds(BatchShape(100)) == pytest.approx(6.88e-5 * 100 + 2.48e-2)
    assert chosen.model.seconds(BatchShape(8000)) == pytest.approx(7.52e-5 * 8000 + 3.0e-3)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(UnknownPresetError, match="opt-13b-h100"):
        preset("gpt")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_coefficients_that_are_no_times_are_refused(bad: float) -> None:
    with pytest.raises(BadModelError):
        Segment(1e-4, b=bad)
    with pytest.raises(BadModelError):
        PerfModel((Segment(1e-4),), margin_s=bad)
    with pytest.raises(BadModelError):
        PerfModel((Segment(1e-4),), attention=bad)


def test_a_model_that_never_grows_is_refused() -> None:
    with pytest.raises(BadModelError):
        PerfModel((Segment(0.0, b=0.01),))
    with pytest.raises(BadModelError):
        PerfModel(())


def test_zero_load_prefill_in_chunks_pays_the_fixed_cost_per_chunk() -> None:
    model = PerfModel((Segment(1e-4, k_ctx=1e-6, b=0.01),))
    assert model.zero_load_prefill_s(1000) == pytest.approx(0.11)
    assert model.zero_load_prefill_s(1000, chunk=500) == pytest.approx(0.06 + 0.06 + 500e-6)
    assert model.zero_load_prefill_s(0) == pytest.approx(0.01 + 1e-4)
