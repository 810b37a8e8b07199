"""The real engine on the CPU under random load of every kind, against plain vLLM token for token.

Promised requests of two tiers, pending ones of every verdict mode, best effort, aborts at any moment, a KV cache that
holds a few requests only, prompts longer than a batch; with prefix caching, without it, and with speculation.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from services.core.slo import BEST_EFFORT, StageKind, StageSlo, VerdictMode
from services.worker.engine_api import EngineEnd, EngineReport, SamplingSpec, Submission
from services.worker.engine_settings import EngineSettings
from services.worker.vllm_engine import VllmEngine
from tests.services.worker.plain_vllm import MODEL, plain_outputs_of
from tests.services.worker.snapshots import snapshot_where

REQUESTS = 40
BLOCK = 32
ENGINES = {
    "caching": {"prefix_caching": True},
    "no caching": {"prefix_caching": False},
    "speculation": {"prefix_caching": True, "speculation_tokens": 5},
}

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    output_tokens: int
    kind: str  # a tier, a verdict mode, or best effort
    ttft_s: float
    delay_s: float
    abort_after_s: float | None


def cases() -> list[Case]:
    rng = random.Random(17)
    shared = [rng.randrange(3, 4096) for _ in range(20 * BLOCK)]
    found: list[Case] = []
    for _ in range(REQUESTS):
        own = [rng.randrange(3, 4096) for _ in range(rng.choice([1, 3, 40, 300]))]
        prompt = shared[: BLOCK * rng.choice([0, 0, 2, 8, 20])] + own
        if rng.random() < 0.3:
            prompt = (prompt * 4)[:600]  # repeats itself, which n-grams find
        found.append(
            Case(
                prompt,
                rng.randint(1, 60),
                rng.choice(["tight", "loose", BEST_EFFORT, BEST_EFFORT, *VerdictMode]),
                rng.choice([0.001, 0.05, 2.0, 30.0]),  # the first is hopeless
                rng.uniform(0, 1.0),
                rng.uniform(0, 0.2) if rng.random() < 0.2 else None,
            )
        )
    return found


def submission(index: int, case: Case) -> Submission:
    now_s = time.monotonic()
    pending = case.kind in set(VerdictMode)
    tier = "loose" if pending else case.kind
    tpot_s = 0.1 if tier == "tight" else 0.4
    return Submission(
        request_id=f"r{index}",
        attempt=1,
        application=("chatbot", "coder")[index % 2],
        token_ids=tuple(case.prompt),
        delivered_tokens=0,
        prompt_digest="",
        sampling=SamplingSpec(case.output_tokens, temperature=0.0, ignore_eos=True),
        stages=(StageSlo(StageKind.ANSWER, case.ttft_s, None, tpot_s, case.output_tokens),),
        tiers=(tier,),
        promised=tier != BEST_EFFORT and not pending,
        ttft_deadline_s=now_s + case.ttft_s,
        arrival_s=now_s,
        forecast_tokens=max(1, case.output_tokens // 2),
        pending=pending,
        verdict_mode=VerdictMode(case.kind) if pending else VerdictMode.FIRM,
    )


@pytest.fixture(scope="module")
async def plain_outputs() -> list[list[int]]:
    return await plain_outputs_of([(case.prompt, case.output_tokens) for case in cases()])


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "speculation" else ()) for name in ENGINES],
)
async def engine(
    request: pytest.FixtureRequest, plain_outputs: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        engine="vllm", model=MODEL, data_dir=tmp_path_factory.mktemp("engine"), dtype="float32", cpu_threads=1,
        profile_s=2.0, max_model_len=2048, max_num_seqs=12, max_batch_tokens=256, kv_cache_gib=0.25, kv_blocks=70,
        **ENGINES[request.param],
    )  # fmt: skip
    engine = VllmEngine(settings)
    await engine.start()
    yield engine
    await engine.stop()


async def run(engine: VllmEngine, index: int, case: Case) -> tuple[list[int], EngineEnd | None]:
    await asyncio.sleep(case.delay_s)  # arrivals spread over the run
    request = submission(index, case)
    loop = asyncio.get_running_loop()
    if case.abort_after_s is not None:
        loop.call_later(case.abort_after_s, lambda: loop.create_task(engine.abort(request.request_id)))
    tokens: list[int] = []
    end = None
    async for output in engine.generate(request):
        tokens += output.token_ids
        end = output.end
    return tokens, end


async def test_every_output_is_plain_vllms_and_nothing_is_left(
    engine: VllmEngine, plain_outputs: list[list[int]]
) -> None:
    reports: list[EngineReport] = []
    with engine.watching(reports.append):
        async with asyncio.timeout(300):  # nobody starves
            ended = await asyncio.gather(*(run(engine, index, case) for index, case in enumerate(cases())))
        aborted = 0
        for index, ((tokens, end), case) in enumerate(zip(ended, cases(), strict=True)):
            if end is EngineEnd.ABORTED:
                assert case.abort_after_s is not None
                aborted += 1
                assert tokens == plain_outputs[index][: len(tokens)], index
            else:
                assert end is EngineEnd.LENGTH
                assert tokens == plain_outputs[index], index
        assert aborted > 0
        assert {decision.admitted for report in reports for decision in report.decided} == {True, False}
    report = await snapshot_where(engine, lambda report: not report.requests)
    assert (report.running, report.waiting, report.best_effort) == (0, 0, 0)
    assert report.free_blocks == engine.info.total_blocks
    if engine._settings.speculation_tokens:
        assert any(shape.draft_steps for one in reports for shape, _ in one.batches)
