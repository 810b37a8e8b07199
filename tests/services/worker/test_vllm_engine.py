"""The real engine on the CPU with the bundled model."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.core.slo import BEST_EFFORT, StageKind, StageSlo
from services.worker.engine_api import EngineEnd, SamplingSpec, Submission
from services.worker.engine_settings import EngineSettings
from services.worker.vllm_engine import VllmEngine
from tests.services.worker.plain_vllm import MODEL, plain_outputs_of
from tests.services.worker.snapshots import snapshot_where

REQUESTS = 40
KV_BLOCKS = 100  # of 32 tokens: a few requests fill them, so that preemption takes part

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]


def settings(data_dir: Path) -> EngineSettings:
    return EngineSettings(
        engine="vllm", model=MODEL, data_dir=data_dir, dtype="float32", cpu_threads=1, profile_s=4.0,
        max_model_len=2048, max_num_seqs=16, kv_cache_gib=0.25, kv_blocks=KV_BLOCKS,
    )  # fmt: skip


def submission(index: int, prompt: list[int], output_tokens: int, promised: bool) -> Submission:
    now_s = time.monotonic()
    return Submission(
        request_id=f"r{index}",
        attempt=1,
        application="app",
        token_ids=tuple(prompt),
        delivered_tokens=0,
        prompt_digest="",
        sampling=SamplingSpec(output_tokens, temperature=0.0, ignore_eos=True),
        stages=(StageSlo(StageKind.ANSWER, 20.0, None, 1.0, output_tokens),),
        tiers=("loose" if promised else BEST_EFFORT,),
        promised=promised,
        ttft_deadline_s=now_s + 20.0,
        arrival_s=now_s,
        forecast_tokens=output_tokens,
    )


def workload() -> list[tuple[list[int], int]]:
    rng = random.Random(5)
    shared = [rng.randrange(3, 4096) for _ in range(200)]
    return [
        (shared[: rng.choice([0, 0, 60, 200])] + [rng.randrange(3, 4096) for _ in range(rng.randint(4, 400))],
         rng.randint(1, 40))
        for _ in range(REQUESTS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
async def plain_outputs() -> list[list[int]]:
    return await plain_outputs_of(workload())


@pytest.fixture(scope="module")
async def engine(plain_outputs: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    engine = VllmEngine(settings(tmp_path_factory.mktemp("engine")))
    await engine.start()
    yield engine
    await engine.stop()


async def test_it_profiles_itself_and_keeps_the_profile(engine: VllmEngine) -> None:
    assert engine.profile.samples >= 30
    assert engine.profile.r2_heldout > 0.8
    assert engine.perf_model.segments
    kept = list((engine._settings.data_dir / "profiles").glob("*.json"))
    assert len(kept) == 1


async def test_outputs_equal_plain_vllm_under_random_load(engine: VllmEngine, plain_outputs: list[list[int]]) -> None:
    rng = random.Random(11)

    async def run(index: int, prompt: list[int], output_tokens: int, delay_s: float) -> list[int]:
        await asyncio.sleep(delay_s)  # arrivals spread over the run
        tokens: list[int] = []
        async for output in engine.generate(submission(index, prompt, output_tokens, promised=index % 3 > 0)):
            tokens += output.token_ids
            last = output
        assert last.end is EngineEnd.LENGTH
        return tokens

    preemptions: list[int] = []
    runs = [run(i, prompt, count, rng.uniform(0, 0.5)) for i, (prompt, count) in enumerate(workload())]
    with engine.watching(lambda report: preemptions.append(report.preemptions)):
        assert await asyncio.gather(*runs) == plain_outputs
    assert preemptions[-1] > preemptions[0]


async def test_promises_are_kept_beside_best_effort(engine: VllmEngine) -> None:
    rng = random.Random(3)

    def prompt(tokens: int) -> list[int]:
        return [rng.randrange(3, 4096) for _ in range(tokens)]

    async def drain(request: Submission) -> tuple[float, float]:
        times_s = [output.emitted_at_s async for output in engine.generate(request)]
        return times_s[0], times_s[-1]

    async def missed(index: int, delay_s: float) -> bool:
        await asyncio.sleep(delay_s)  # arrivals spread over the run
        request = replace(submission(100 + index, prompt(200), 20, promised=True), stages=(stage,))
        request = replace(request, ttft_deadline_s=request.arrival_s + 2.0)
        first_s, last_s = await drain(request)
        return first_s > request.ttft_deadline_s or last_s - first_s > 19 * stage.tpot_s

    stage = StageSlo(StageKind.ANSWER, 2.0, None, 0.15, 20)
    background = asyncio.gather(*(drain(submission(200 + i, prompt(1200), 60, promised=False)) for i in range(10)))
    misses = sum(await asyncio.gather(*(missed(i, 0.15 * i) for i in range(30))))
    await background
    assert misses <= 3


async def test_all_blocks_come_back(engine: VllmEngine) -> None:
    report = await snapshot_where(engine, lambda report: not report.requests)
    assert report.free_blocks == engine.info.total_blocks
