"""Probes, what is kept of them, and fitted profiles on disk."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from services.core.fit import Sample, fit
from services.core.perf_model import BatchShape, PerfModel, Segment
from services.worker.engine_api import EngineInfo
from services.worker.profile import probes, repeated, runs, warm_up_probes
from services.worker.profile_store import (
    ProfiledBatch,
    ProfileKey,
    ReplicaProfile,
    load_profile,
    model_fingerprint,
    profile_of,
    save_profile,
)

INFO = EngineInfo("m", 2048, 1000, 16, 32, False)
KEY = ProfileKey("m", "cpu", "0.32.0", "float32", 1, 16, 1024)
BATCHES = tuple(
    ProfiledBatch(Sample(BatchShape(n, 2 * n, 1, n % 2, 2.5 * n * n), n / 1000), n == 3) for n in range(1, 6)
)
PROFILE = ReplicaProfile(PerfModel((Segment(1e-4, 1e-7, 1e-5, 0.0, 2e-3),), 0.001, 0.97, 1e-3), 0.97, 250, BATCHES)


def test_probes_fit_the_engine() -> None:
    for probe in [*warm_up_probes(INFO, 1024), *islice(probes(INFO, 1024, random.Random(1)), 300)]:
        assert 1 <= probe.requests <= 32
        assert 1 <= probe.prompt_tokens <= 2048 - probe.steps
        assert 1 <= probe.budget <= 1024


def test_probes_reach_the_corners() -> None:
    sample = list(islice(probes(INFO, 1024, random.Random(1)), 300))
    assert min(probe.budget for probe in sample) < 32
    assert max(probe.budget for probe in sample) > 900
    assert {probe.requests for probe in sample} >= {1, 32}


def test_a_shape_counts_once_with_its_fastest_run() -> None:
    shape, seldom = BatchShape(10, 0, 1), BatchShape(11, 0, 1)
    samples = [Sample(shape, 0.5), Sample(shape, 0.1), Sample(seldom, 0.1), Sample(shape, 0.2)]
    assert repeated(samples) == [Sample(shape, 0.1)]


def test_a_profile_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    assert load_profile(KEY, tmp_path) is None
    save_profile(KEY, PROFILE, tmp_path)
    kept = load_profile(KEY, tmp_path)
    assert kept == ReplicaProfile(PROFILE.model, 0.97, 250, BATCHES, cached=True)


def test_a_profile_keeps_the_batches_it_was_fitted_to_and_those_that_judged_it() -> None:
    rng = random.Random(1)
    samples = [Sample(BatchShape(n, 0, 1), 0.01 + n * 1e-4 * rng.uniform(0.9, 1.1)) for n in range(8, 4008)]
    result = fit(samples)
    profile = profile_of(result, samples)
    times = [batch.sample.seconds for batch in profile.batches]
    assert 500 <= len(times) <= 1000 < profile.samples == 4000
    assert times == sorted(times)
    by_sample = {batch.sample: batch.heldout for batch in profile.batches}
    heldout = {samples[index] for index in result.heldout}
    assert all(held == (sample in heldout) for sample, held in by_sample.items())
    assert 0.2 < sum(by_sample.values()) / len(by_sample) < 0.3


def test_another_replica_has_another_profile(tmp_path: Path) -> None:
    save_profile(KEY, PROFILE, tmp_path)
    assert load_profile(ProfileKey("m", "cpu", "0.32.0", "bfloat16", 1, 16, 1024), tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"format": 0})])
def test_a_spoiled_file_means_measuring_again(tmp_path: Path, text: str) -> None:
    save_profile(KEY, PROFILE, tmp_path).write_text(text, encoding="utf-8")
    assert load_profile(KEY, tmp_path) is None


def test_a_changed_configuration_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = model_fingerprint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8")
    assert model_fingerprint(str(tmp_path)) != before
    assert model_fingerprint("org/model") == "org/model"


def test_an_engine_that_drafts_is_probed_with_every_number_of_drafts() -> None:
    sample = list(islice(probes(INFO, 1024, random.Random(1), max_drafts=5), 300))
    assert {probe.draft_steps for probe in sample} == {0, 1, 2, 3, 4, 5}
    drafting = [probe for probe in sample if probe.draft_steps]
    assert len(drafting) == 100
    for probe in drafting:
        assert probe.requests * (1 + probe.draft_steps) <= probe.budget <= 1024
        assert 1 <= probe.requests <= 32
        assert 16 <= probe.prompt_tokens <= 2048 - probe.steps * (1 + probe.draft_steps)


def test_a_probe_with_two_batches_in_flight_gives_the_mean_batch_of_its_prefill_and_of_its_decoding() -> None:
    """A chunk's launch is charged to the chunk before it: 44 and 4 ms are two chunks of 24 ms."""
    chunks = [Sample(BatchShape(800, 0, 1, 0, 320_000.0), 0.044), Sample(BatchShape(800, 800, 1, 0, 960_000.0), 0.004)]
    decodes = [Sample(BatchShape(1, 1600 + n, 1), 0.005) for n in range(3)]
    assert runs([*chunks, *decodes]) == [
        Sample(BatchShape(800, 400, 1, 0, 640_000.0), pytest.approx(0.024)),
        Sample(BatchShape(1, 1601, 1), pytest.approx(0.005)),
    ]


def test_with_two_batches_in_flight_probes_decode_longer_and_still_fit() -> None:
    for probe in islice(probes(INFO, 1024, random.Random(1), in_flight=2), 300):
        assert probe.steps == 8
        assert probe.prompt_tokens <= 2048 - probe.steps
