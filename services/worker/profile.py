"""Measuring a replica at start: real batches of many shapes through the engine, and the fit over them."""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import cycle, groupby
from typing import TYPE_CHECKING

from services.core.fit import Sample, fit
from services.core.perf_model import BatchShape
from services.worker.engine_api import EngineInfo, EngineReport
from services.worker.engine_settings import EngineSettings
from services.worker.profile_store import (
    ProfileKey,
    ReplicaProfile,
    load_profile,
    model_fingerprint,
    profile_of,
    save_profile,
)
from services.worker.request_terms import ProbeTerms
from services.worker.version_guard import check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from services.worker.vllm_engine import VllmEngine

_log = logging.getLogger(__name__)

__all__ = ["Probe", "load_or_measure", "measure", "probes", "repeated", "runs", "warm_up_probes"]

_SEED = 1
_STEPS = 4
_REPEATS = 3
_SMALLEST_BUDGET = 16
_LONG_SHARE = 0.3  # of the probes have few requests with long prompts
_LONG_REQUESTS = 8
_DRAFTED_PROMPT = 16  # tokens at least: enough to repeat itself
_PROBE_TIMEOUT_S = 120.0
_GOOD_R2 = 0.95
_ENOUGH = 16  # batches that a fit is made of on a machine too slow to run more in time
_PATIENCE = 3.0  # times the time asked for
_WORTH_KEEPING_R2 = 0.8


@dataclass(frozen=True, slots=True)
class Probe:
    """`requests` prompts of `prompt_tokens` each, prefilled in batches of `budget` tokens, then `steps - 1` decodes.

    Each decode verifies `draft_steps` drafts.
    """

    requests: int
    prompt_tokens: int
    budget: int
    steps: int
    draft_steps: int = 0


async def load_or_measure(
    engine: "VllmEngine", settings: EngineSettings, config: "VllmConfig", hardware: str
) -> ReplicaProfile:
    """The replica's performance model, from the cache or from a few seconds of probes.

    A profile too poor to plan with is used, because there is no better one, but not kept: the next start measures. The
    engine is warm afterwards in either case: the first batch of every size pays for memory and lazy initialisation.
    """
    max_batch_tokens = int(config.scheduler_config.max_num_batched_tokens)
    key = ProfileKey(
        model=model_fingerprint(settings.model),
        hardware=hardware,
        vllm=check_vllm(),
        dtype=str(config.model_config.dtype),
        threads=int(os.environ["OMP_NUM_THREADS"]),
        block_size=engine.info.block_size,
        max_batch_tokens=max_batch_tokens,
        draft_steps=settings.speculation_tokens,
        extra=json.dumps(dict(settings.extra), sort_keys=True) if settings.extra else "",
        async_scheduling=engine.info.async_scheduling,
    )
    vocabulary = int(config.model_config.get_vocab_size())
    kept = load_profile(key, settings.data_dir)
    if kept is not None:
        observer = _Observer()
        with engine.watching(observer):
            await _warm_up(engine, vocabulary, max_batch_tokens, settings.speculation_tokens, observer)
        return kept
    profile = await measure(engine, vocabulary, settings.profile_s, max_batch_tokens, settings.speculation_tokens)
    if profile.r2_heldout >= _WORTH_KEEPING_R2:
        save_profile(key, profile, settings.data_dir)
    else:
        _log.warning(
            "the performance model explains only %.0f %% of the variance of batch times: fewer promises will be made, "
            "and more of them broken, until it has been corrected on line; `slosctl perf` shows the batches",
            100 * max(0.0, profile.r2_heldout),
        )
    return profile


async def measure(
    engine: "VllmEngine", vocabulary: int, seconds: float, max_batch_tokens: int, max_drafts: int = 0
) -> ReplicaProfile:
    """Send probes through the engine for about `seconds` and fit the performance model to what was observed.

    On an engine that verifies up to `max_drafts` drafts, every third probe does.

    On a machine that is busy with other things it takes as long as the fewest probes do, and the same ones are run
    again until the fit is good or patience ends.

    Raises NotEnoughSamplesError where the engine did not run enough different batches in that time.
    """
    observer = _Observer()
    rng = random.Random(_SEED)
    ran: list[Probe] = []
    with engine.watching(observer):
        await _warm_up(engine, vocabulary, max_batch_tokens, max_drafts, observer)
        in_flight = 2 if engine.info.async_scheduling else 1
        samples: list[Sample] = []

        async def run(probe: Probe) -> None:
            batches = await _run(engine, probe, rng, vocabulary, observer)
            samples.extend(batches if in_flight == 1 else runs(batches))

        start_s = time.monotonic()
        for probe in probes(engine.info, max_batch_tokens, rng, max_drafts, in_flight):
            ran.append(probe)
            for _ in range(_REPEATS):
                await run(probe)
            if time.monotonic() >= start_s + seconds and len(repeated(samples)) >= _ENOUGH:
                break
        profile = _fitted(samples)
        while profile.r2_heldout < _GOOD_R2 and time.monotonic() < start_s + _PATIENCE * seconds:
            for probe in ran:
                await run(probe)
            profile = _fitted(samples)
    return profile


async def _warm_up(
    engine: "VllmEngine", vocabulary: int, max_batch_tokens: int, max_drafts: int, observer: "_Observer"
) -> None:
    rng = random.Random(_SEED)
    for probe in warm_up_probes(engine.info, max_batch_tokens, max_drafts):
        await _run(engine, probe, rng, vocabulary, observer)


def _fitted(samples: Sequence[Sample]) -> ReplicaProfile:
    chosen = repeated(samples)
    return profile_of(fit(chosen), chosen)


def repeated(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per shape that was run at least `_REPEATS` times, with its shortest time.

    A process that was paused and the first batch of a new size take several times as long as the batch itself does.
    The model is of the batch; how much more it takes on a busy machine is followed by the on-line correction.
    """
    times: dict[BatchShape, list[float]] = {}
    for sample in samples:
        times.setdefault(sample.shape, []).append(sample.seconds)
    return [Sample(shape, min(seconds)) for shape, seconds in times.items() if len(seconds) >= _REPEATS]


def runs(batches: Sequence[Sample]) -> list[Sample]:
    """Of one probe's batches, in order: one sample for its prefill and one for its decoding, the mean batch of each.

    (More of them where a request was preempted.) A mean of unlike batches is off where the model bends, by a few
    percent.

    With two batches in flight a batch is seen to end no earlier than the next one has been launched. Where launching
    takes longer than computing, a batch's own time is charged to the one before it; that of a run of like ones is
    right.
    """
    found = []
    for _, group in groupby(batches, key=lambda sample: sample.shape.attended > 0):
        run = list(group)
        tokens, context, requests, drafts, pairs = (
            sum(values) / len(run) for values in zip(*(astuple(sample.shape) for sample in run), strict=True)
        )
        shape = BatchShape(round(tokens), round(context), round(requests), round(drafts), pairs)
        found.append(Sample(shape, sum(sample.seconds for sample in run) / len(run)))
    return found


class _Observer:
    """Collects batches from reports, and lets a probe wait for the engine to be as it needs it."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._ended = 0
        self._changed = asyncio.Event()

    def __call__(self, report: EngineReport) -> None:
        self.samples.extend(Sample(shape, took_s) for shape, took_s in report.batches)
        self._ended += len(report.removed_ids)
        self._changed.set()

    def take(self) -> list[Sample]:
        """The batches reported since the last call, in order."""
        taken, self.samples = self.samples, []
        return taken

    async def ended(self, requests: int) -> None:
        """Return once this many more requests were reported gone, their last batch with them."""
        while self._ended < requests:
            self._changed.clear()
            await self._changed.wait()
        self._ended = 0


def warm_up_probes(info: EngineInfo, max_batch_tokens: int, max_drafts: int = 0) -> Iterator[Probe]:
    """One probe of every batch size, of the most requests, and of the most drafts; largest first."""
    budget = max_batch_tokens
    while budget >= _SMALLEST_BUDGET:
        yield Probe(1, min(budget, _longest_prompt(info)), budget, 2)
        budget //= 2
    yield Probe(info.max_num_seqs, 16, max_batch_tokens, 3)
    if max_drafts:
        yield Probe(1, _DRAFTED_PROMPT, max_batch_tokens, _STEPS, max_drafts)


def probes(
    info: EngineInfo, max_batch_tokens: int, rng: random.Random, max_drafts: int = 0, in_flight: int = 1
) -> Iterator[Probe]:
    """Probes without end: batch sizes spread evenly, every other one on a logarithmic scale; requests on that scale.

    With two batches `in_flight` decoding takes twice as many steps, of which the last is not observed.
    """
    longest = _longest_prompt(info, in_flight)
    for index, logarithmic in enumerate(cycle((True, False))):
        if max_drafts and index % 3 == 2:
            yield _drafting(info, max_batch_tokens, rng, max_drafts)
            continue
        budget = round(_SMALLEST_BUDGET * (max_batch_tokens / _SMALLEST_BUDGET) ** rng.random())
        if not logarithmic:
            budget = rng.randint(_SMALLEST_BUDGET, max_batch_tokens)
        requests = round(info.max_num_seqs ** rng.random())
        prompt_tokens = round(budget * rng.uniform(0.5, 2.0) / requests)
        if rng.random() < _LONG_SHARE:
            requests = round(_LONG_REQUESTS ** rng.random())
            prompt_tokens = round(budget * rng.uniform(1.0, 4.0) / requests)
        yield Probe(requests, max(4, min(longest, prompt_tokens)), max(budget, requests), _STEPS * in_flight)


def _drafting(info: EngineInfo, max_batch_tokens: int, rng: random.Random, max_drafts: int) -> Probe:
    drafts = rng.randint(1, max_drafts)
    most = min(info.max_num_seqs, max_batch_tokens // (1 + drafts))
    requests = round(most ** rng.random())
    longest = min(_longest_prompt(info) - _STEPS * drafts, max(_DRAFTED_PROMPT, max_batch_tokens // requests))
    prompt_tokens = rng.randint(min(_DRAFTED_PROMPT, longest), longest)
    return Probe(requests, prompt_tokens, max_batch_tokens, _STEPS, drafts)


def _longest_prompt(info: EngineInfo, in_flight: int = 1) -> int:
    return info.max_model_len - _STEPS * in_flight - 1


async def _run(
    engine: "VllmEngine", probe: Probe, rng: random.Random, vocabulary: int, observer: _Observer
) -> list[Sample]:
    """Run one probe to its end; its batches.

    Nothing runs until all its requests are in the engine, so that taking them in is not measured.
    """
    terms = ProbeTerms(probe.requests, probe.budget, probe.draft_steps)
    async with asyncio.timeout(_PROBE_TIMEOUT_S), asyncio.TaskGroup() as tasks:
        for index in range(probe.requests):
            prompt = [rng.randrange(vocabulary) for _ in range(probe.prompt_tokens)]
            if probe.draft_steps:
                prompt = prompt[:1] * probe.prompt_tokens
            tasks.create_task(engine.run_probe(f"probe-{index}", prompt, probe.steps, terms))
    async with asyncio.timeout(_PROBE_TIMEOUT_S):
        await observer.ended(probe.requests)
    return observer.take()
