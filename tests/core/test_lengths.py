"""On-line forecasts of output lengths."""

import numpy as np
import pytest

from services.core.lengths import LengthForecaster


def taught(seed: int = 0, count: int = 2000) -> tuple[LengthForecaster, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(5.0, 0.6, size=count).astype(int))
    forecaster = LengthForecaster(memory=1000)
    for length in lengths:
        forecaster.observe("chatbot", 1000, int(length))
    return forecaster, lengths


def test_mean_and_quantile_are_learned() -> None:
    forecaster, lengths = taught()
    forecast = forecaster.forecast("chatbot", 1000, max_tokens=10_000)
    assert forecast.mean_tokens == pytest.approx(lengths.mean(), rel=0.1)
    assert forecast.quantile_tokens == pytest.approx(np.quantile(lengths, 0.9), rel=0.15)


def test_a_request_that_outlives_its_forecast_gets_a_longer_one() -> None:
    forecaster, lengths = taught()
    for generated in (100, 200, 400):
        forecast = forecaster.forecast("chatbot", 1000, 10_000, generated_tokens=generated)
        beyond = lengths[lengths > generated]
        assert forecast.mean_tokens > generated
        assert forecast.mean_tokens == pytest.approx(beyond.mean(), rel=0.2)


def test_a_forecast_never_exceeds_max_tokens_nor_ends_in_the_past() -> None:
    forecaster, _ = taught()
    assert forecaster.forecast("chatbot", 1000, max_tokens=50).mean_tokens == 50
    beyond_all = forecaster.forecast("chatbot", 1000, 100_000, generated_tokens=50_000)
    assert beyond_all.mean_tokens > 50_000
    assert forecaster.forecast("chatbot", 1000, 60, generated_tokens=60).mean_tokens == 60


def test_prompt_buckets_are_kept_apart_and_fall_back_to_the_application() -> None:
    forecaster = LengthForecaster()
    for _ in range(50):
        forecaster.observe("chatbot", 100, 20)
        forecaster.observe("chatbot", 5000, 400)
    assert forecaster.forecast("chatbot", 100, 1000).mean_tokens == 20
    assert forecaster.forecast("chatbot", 5000, 1000).mean_tokens == 400
    assert 100 < forecaster.forecast("chatbot", 20, 1000).mean_tokens < 300
    assert 100 < forecaster.forecast("summarizer", 20, 1000).mean_tokens < 300


def test_nothing_seen_gives_the_default() -> None:
    forecast = LengthForecaster(default_tokens=128).forecast("new", 10, 1000)
    assert (forecast.mean_tokens, forecast.samples) == (128, 0.0)


def test_old_lengths_fade() -> None:
    forecaster = LengthForecaster(memory=50)
    for _ in range(200):
        forecaster.observe("chatbot", 100, 1000)
    for _ in range(200):
        forecaster.observe("chatbot", 100, 50)
    assert forecaster.forecast("chatbot", 100, 5000).mean_tokens < 120
