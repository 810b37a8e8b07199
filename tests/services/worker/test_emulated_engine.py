"""The emulated engine end to end: real AsyncLLM, engine process and scheduler with our hook, but no model."""

import asyncio
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from zlib import crc32

import pytest

from services.common.clock import Clock
from services.core.slo import BEST_EFFORT, StageKind, StageSlo
from services.planner.state import parse_state
from services.worker.engine_api import EngineEnd, EngineOutput, EngineReport, SamplingSpec, Submission
from services.worker.engine_arguments import special_ids_of
from services.worker.engine_settings import EngineSettings
from services.worker.hash_tokens import HashTokens
from services.worker.state_mirror import StateMirror
from services.worker.vllm_engine import VllmEngine
from tests.services.worker.snapshots import snapshot_where

MODEL = str(Path(__file__).parents[3] / "models" / "tiny")
VOCABULARY = 4096
TIMEOUT_S = 60.0

ENGINE_HOLDER = """
import asyncio, multiprocessing, sys
from pathlib import Path
from services.worker.engine_settings import EngineSettings
from services.worker.vllm_engine import VllmEngine

async def hold():
    engine = VllmEngine(EngineSettings(engine="emulated", model=sys.argv[1], data_dir=Path(sys.argv[2])))
    await engine.start()
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(hold())
"""

pytestmark = pytest.mark.asyncio(loop_scope="module")


def submission(
    name: str,
    *,
    prompt: tuple[int, ...] | None = None,
    prompt_tokens: int = 50,
    output_tokens: int = 10,
    promised: bool = True,
    ttft_s: float = 5.0,
    delivered: tuple[int, ...] = (),
) -> Submission:
    now_s = time.monotonic()
    ids = (
        prompt
        if prompt is not None
        else tuple(3 + (index * 17 + crc32(name.encode())) % 4000 for index in range(prompt_tokens))
    )
    stage = StageSlo(StageKind.ANSWER, ttft_s, None, 0.2, output_tokens)
    return Submission(
        request_id=name,
        attempt=1,
        application="app",
        token_ids=ids + delivered,
        delivered_tokens=len(delivered),
        prompt_digest=f"digest-{name}",
        sampling=SamplingSpec(output_tokens, ignore_eos=True),
        stages=(stage,),
        tiers=("loose" if promised else BEST_EFFORT,),
        promised=promised,
        ttft_deadline_s=now_s + ttft_s,
        arrival_s=now_s,
        forecast_tokens=output_tokens,
        first_token_s=now_s if delivered else None,
    )


def expected(name: str, prompt_tokens: int, count: int) -> list[int]:
    return HashTokens(VOCABULARY, special_ids_of(MODEL)).continuation(f"digest-{name}", prompt_tokens, count)


async def collect(engine: VllmEngine, request: Submission) -> list[EngineOutput]:
    return [output async for output in engine.generate(request)]


def ids_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def wait_gone(pid: int) -> bool:
    """Whether the process ended within the timeout."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], TIMEOUT_S)[0])
    finally:
        os.close(descriptor)


class Reports:
    """Reports of an engine, kept, with a way to wait for one."""

    def __init__(self) -> None:
        self.seen: list[EngineReport] = []
        self._arrived = asyncio.Event()

    def __call__(self, report: EngineReport) -> None:
        self.seen.append(report)
        self._arrived.set()

    async def until(self, wanted: Callable[[EngineReport], bool]) -> EngineReport:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for report in self.seen:
                    if wanted(report):
                        return report
                self._arrived.clear()
                await self._arrived.wait()


@pytest.fixture(scope="module", params=[False, True], ids=["one-batch", "two-batches"])
async def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        engine="emulated",
        model=MODEL,
        data_dir=tmp_path_factory.mktemp("engine"),
        async_scheduling=request.param,
    )
    engine = VllmEngine(settings)
    await engine.start()
    yield engine
    await engine.stop()


async def test_it_is_what_the_preset_says(engine: VllmEngine) -> None:
    info = engine.info
    assert (info.max_model_len, info.block_size, info.max_num_seqs) == (32768, 16, 512)
    assert info.total_blocks > 60_000
    assert info.eos_token_ids == (1,)
    assert engine.profile.r2_heldout == 1.0


async def test_tokens_are_the_hash_of_prompt_and_position(engine: VllmEngine) -> None:
    requests = [
        submission(f"hash{i}", prompt_tokens=20 + 37 * i, output_tokens=5 + i, promised=i % 3 > 0) for i in range(20)
    ]
    outputs = await asyncio.gather(*(collect(engine, request) for request in requests))
    for request, got in zip(requests, outputs, strict=True):
        assert ids_of(got) == expected(request.request_id, len(request.token_ids), request.sampling.max_tokens)
        assert got[-1].end is EngineEnd.LENGTH
        assert all(output.end is None for output in got[:-1])


async def test_a_later_attempt_continues_exactly(engine: VllmEngine) -> None:
    whole = expected("again", 50, 20)
    first = await collect(engine, submission("again", output_tokens=8))
    second = await collect(engine, submission("again", output_tokens=12, delivered=tuple(whole[:8])))
    assert ids_of(first) + ids_of(second) == whole


async def test_steps_take_the_modelled_time(engine: VllmEngine) -> None:
    outputs = await collect(engine, submission("pace", output_tokens=60))
    spent_s = outputs[-1].emitted_at_s - outputs[0].emitted_at_s
    assert spent_s / 59 > 0.0140  # the preset's shortest step: an engine cannot be faster than its hardware


async def test_a_stop_token_ends_the_request(engine: VllmEngine) -> None:
    tokens = expected("stop", 50, 10)
    request = submission("stop")
    request = Submission(**{f: getattr(request, f) for f in Submission.__slots__} | {
        "sampling": SamplingSpec(10, ignore_eos=True, stop_token_ids=(tokens[3],))
    })  # fmt: skip
    outputs = await collect(engine, request)
    assert ids_of(outputs) == tokens[: tokens.index(tokens[3]) + 1]
    assert outputs[-1].end is EngineEnd.STOP


async def test_an_abort_frees_the_blocks_and_ends_the_iterator(engine: VllmEngine) -> None:
    reports = Reports()
    with engine.watching(reports):
        outputs = engine.generate(submission("gone", prompt_tokens=4000, output_tokens=4000))
        await anext(outputs)
        held = await reports.until(lambda r: any(p.request_id == "gone" and p.output_tokens for p in r.requests))
        await engine.abort("gone")
        last = [output async for output in outputs][-1]
        freed = await reports.until(lambda r: "gone" in r.removed_ids)
    assert last.end is EngineEnd.ABORTED
    assert freed.free_blocks - held.free_blocks >= 4000 // 16
    assert freed.running == freed.waiting == 0


async def test_closing_the_iterator_aborts(engine: VllmEngine) -> None:
    reports = Reports()
    with engine.watching(reports):
        outputs = engine.generate(submission("closed", output_tokens=5000))
        await anext(outputs)
        await outputs.aclose()  # type: ignore[attr-defined]
        await reports.until(lambda r: "closed" in r.removed_ids)


async def test_reports_follow_a_request_from_arrival_to_end(engine: VllmEngine) -> None:
    reports = Reports()
    with engine.watching(reports):
        await collect(engine, submission("told", prompt_tokens=100, output_tokens=30))
        await reports.until(lambda r: "told" in r.removed_ids)
    said = [p for report in reports.seen for p in report.requests if p.request_id == "told"]
    assert {(p.tier, p.promised, p.application, p.attempt) for p in said} == {("loose", True, "app", 1)}
    assert [p.output_tokens for p in said] == sorted(p.output_tokens for p in said)
    assert said[-1].started
    assert said[-1].scheduled_at_s is not None
    batches = [shape for report in reports.seen for shape, _ in report.batches]
    last = 1 if engine.info.async_scheduling else 0  # of two batches in flight the last is not observed
    assert sum(shape.tokens for shape in batches) >= 100 + 29 - last
    assert [report.step for report in reports.seen] == sorted(report.step for report in reports.seen)


async def test_a_snapshot_holds_every_request(engine: VllmEngine) -> None:
    outputs = [engine.generate(submission(f"snap{i}", output_tokens=3000)) for i in range(3)]
    for output in outputs:
        await anext(output)
    await snapshot_where(engine, lambda report: {p.request_id for p in report.requests} >= {"snap0", "snap1", "snap2"})
    for index, output in enumerate(outputs):
        await engine.abort(f"snap{index}")
        assert [o async for o in output][-1].end is EngineEnd.ABORTED


async def test_a_promotion_takes_effect(engine: VllmEngine) -> None:
    reports = Reports()
    with engine.watching(reports):
        outputs = engine.generate(submission("up", output_tokens=200, promised=False))
        await anext(outputs)
        engine.promote("up", "tight")
        await reports.until(
            lambda r: any(p.request_id == "up" and p.promised and p.tier == "tight" for p in r.requests)
        )
        await engine.abort("up")
        assert [output async for output in outputs][-1].end is EngineEnd.ABORTED


async def test_a_prompt_beyond_the_context_is_an_error_of_that_request_alone(engine: VllmEngine) -> None:
    outputs = await collect(engine, submission("long", prompt_tokens=40_000))
    assert [output.end for output in outputs] == [EngineEnd.ERROR]
    assert outputs[0].error
    assert (await collect(engine, submission("after")))[-1].end is EngineEnd.LENGTH


async def test_promises_are_kept_in_real_time(engine: VllmEngine) -> None:
    async def late(index: int) -> bool:
        await asyncio.sleep(index * 0.03)
        request = submission(f"load{index}", prompt_tokens=100 + 60 * (index % 9), output_tokens=20, ttft_s=2.0)
        outputs = await collect(engine, request)
        spent_s = outputs[-1].emitted_at_s - outputs[0].emitted_at_s
        return outputs[0].emitted_at_s > request.ttft_deadline_s or spent_s > 19 * 0.2

    filler = [submission(f"fill{i}", prompt_tokens=1500, output_tokens=40, promised=False) for i in range(12)]
    background = asyncio.gather(*(collect(engine, request) for request in filler))
    missed = sum(await asyncio.gather(*(late(index) for index in range(60))))
    await background
    assert missed <= 6


async def test_an_interrupt_is_the_workers_business(engine: VllmEngine) -> None:
    outputs = engine.generate(submission("interrupted", output_tokens=40))
    await anext(outputs)
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    assert [output async for output in outputs][-1].end is EngineEnd.LENGTH
    assert not engine.dead


async def test_a_killed_worker_leaves_no_engine_behind(tmp_path: Path) -> None:
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE_HOLDER, MODEL, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert worker.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        pids = [int(pid) for pid in (await worker.stdout.readline()).split()]
    assert pids
    ends = [asyncio.to_thread(wait_gone, pid) for pid in pids]
    worker.kill()
    assert await asyncio.gather(*ends) == [True] * len(pids)


async def test_a_dead_engine_ends_every_iterator(engine: VllmEngine) -> None:
    """Last in this file: the engine does not come back."""
    outputs = [engine.generate(submission(f"dead{i}", output_tokens=5000)) for i in range(3)]
    for output in outputs:
        await anext(output)
    for process in multiprocessing.active_children():
        process.kill()
    async with asyncio.timeout(TIMEOUT_S):
        ends = [[o async for o in output][-1] for output in outputs]
        await engine.wait_dead()
    assert {end.end for end in ends} == {EngineEnd.ERROR}
    assert engine.dead
    assert (await collect(engine, submission("too-late")))[-1].end is EngineEnd.ERROR


@pytest.mark.slow
async def test_it_speculates_with_the_same_tokens_in_fewer_steps(tmp_path: Path) -> None:
    settings = EngineSettings(
        engine="emulated", model=MODEL, data_dir=tmp_path, speculation_tokens=6, emulated_acceptance=0.8
    )
    engine, reports = VllmEngine(settings), Reports()
    await engine.start()
    try:
        with engine.watching(reports):
            names = [f"s{index}" for index in range(4)]
            found = await asyncio.gather(*(collect(engine, submission(name, output_tokens=80)) for name in names))
            await reports.until(lambda report: any(shape.draft_steps for shape, _ in report.batches))
            clock = Clock()
            mirror = StateMirror("w0", engine.info, engine.perf_model, clock)
            for report in reports.seen:
                mirror.apply(report)
            known = parse_state(mirror.message(full=True), tiers=(), clock=clock).drafts
    finally:
        await engine.stop()
    assert known is not None
    assert known.max_verify_tokens == 7
    assert known.rate("app") == pytest.approx(0.8, abs=0.15)  # what the planner plans with
    for name, outputs in zip(names, found, strict=True):
        assert ids_of(outputs) == expected(name, 50, 80)
        assert len(outputs) < 50
