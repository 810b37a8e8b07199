"""An engine in memory: one token per request and `step()`, so that a test decides when anything happens.

Token n of a request (0-based, over its whole output) is `1000 + n` unless `scripts` names its tokens.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from services.core.fit import Sample
from services.core.perf_model import BatchShape, PerfModel, Segment
from services.worker.engine_api import (
    EngineEnd,
    EngineInfo,
    EngineOutput,
    EngineReport,
    RequestDecision,
    RequestProgress,
    Submission,
)
from services.worker.profile_store import ProfiledBatch, ReplicaProfile

INFO = EngineInfo(
    model="scripted",
    max_model_len=256,
    total_blocks=100,
    block_size=16,
    max_num_seqs=32,
    async_scheduling=False,
    eos_token_ids=(2,),
    max_batch_tokens=512,
)
MODEL = PerfModel((Segment(1e-4, b=0.01),))


@dataclass(eq=False)
class Running:
    submission: Submission
    outputs: asyncio.Queue[EngineOutput | Exception] = field(default_factory=asyncio.Queue)
    produced: int = 0
    held_back: bool = False  # submitted, but its prefill does not begin
    scheduled_at_s: float | None = None


class ScriptedEngine:
    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.submissions: list[Submission] = []
        self.scripts: dict[str, list[int]] = {}
        self.hold_back: set[str] = set()
        self.aborted: list[str] = []
        self.promoted: list[tuple[str, str]] = []
        self.reforecasts: list[tuple[str, int]] = []
        self.duration_cap_s: float | None = None
        self.promises_expected = 0
        self.free_blocks = INFO.total_blocks
        self.stopped = False
        self._changed = asyncio.Event()
        self._dead = asyncio.Event()
        self._reports: asyncio.Queue[EngineReport] = asyncio.Queue()
        self._step = 0

    info = INFO
    perf_model = MODEL
    profile = ReplicaProfile(MODEL, 0.9, 3, (ProfiledBatch(Sample(BatchShape(7, 5, 1, 2), 0.011), True),))

    async def start(self) -> None:
        return None

    async def stop(self) -> None:
        self.stopped = True

    async def wait_dead(self) -> None:
        await self._dead.wait()

    async def generate(self, submission: Submission) -> AsyncIterator[EngineOutput]:
        running = Running(submission, held_back=submission.request_id in self.hold_back)
        self.running[submission.request_id] = running
        self.submissions.append(submission)
        self._changed.set()
        try:
            while True:
                output = await running.outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.end is not None:
                    return
        finally:
            self.running.pop(submission.request_id, None)
            self._changed.set()

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        running = self.running.pop(request_id, None)
        if running is not None:
            running.outputs.put_nowait(EngineOutput(request_id, (), time.monotonic(), EngineEnd.ABORTED))
            self._changed.set()

    def promote(self, request_id: str, tier: str) -> None:
        self.promoted.append((request_id, tier))

    def reforecast(self, request_id: str, output_tokens: int) -> None:
        self.reforecasts.append((request_id, output_tokens))

    def set_duration_cap(self, seconds: float | None) -> None:
        self.duration_cap_s = seconds

    def expect_promises(self) -> None:
        self.promises_expected += 1

    def request_snapshot(self) -> None:
        self.report(full=True)

    async def reports(self) -> AsyncIterator[EngineReport]:
        while True:
            yield await self._reports.get()

    # What tests do

    async def until_running(self, *request_ids: str) -> None:
        await self._until(lambda: all(request_id in self.running for request_id in request_ids))

    async def until_gone(self, request_id: str) -> None:
        await self._until(lambda: request_id not in self.running)

    async def _until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            now_s = time.monotonic()
            self._step += 1
            for running in [one for one in self.running.values() if not one.held_back]:
                running.scheduled_at_s = running.scheduled_at_s or now_s
                running.outputs.put_nowait(self._output(running, now_s))
            self.report()

    def fail(self, request_id: str, error: Exception) -> None:
        self.running[request_id].outputs.put_nowait(error)

    def die(self) -> None:
        for running in self.running.values():
            running.outputs.put_nowait(RuntimeError("the engine process is gone"))
        self._dead.set()

    def report(
        self,
        *,
        full: bool = False,
        demoted: tuple[RequestDecision, ...] = (),
        released: tuple[str, ...] = (),
        decided: tuple[RequestDecision, ...] = (),
        token_budget: int = 64,
        batches: tuple[tuple[BatchShape, float], ...] = (),
    ) -> None:
        self._reports.put_nowait(
            EngineReport(
                step=self._step,
                observed_at_s=time.monotonic(),
                full=full,
                requests=tuple(self._progress()),
                removed_ids=(),
                free_blocks=self.free_blocks,
                engine_free_at_s=time.monotonic(),
                running=len(self.running),
                waiting=0,
                best_effort=0,
                best_effort_prefill_tokens=0,
                preemptions=0,
                token_budget=token_budget,
                batches=batches,
                demoted=demoted,
                released_ids=released,
                decided=decided,
            )
        )

    def _output(self, running: Running, now_s: float) -> EngineOutput:
        submission = running.submission
        script = self.scripts.get(submission.request_id)
        index = running.produced
        token = script[index] if script is not None else 1000 + submission.delivered_tokens + index
        running.produced += 1
        end = None
        if token in submission.sampling.stop_token_ids or token in INFO.eos_token_ids:
            end = EngineEnd.STOP
        elif running.produced >= submission.sampling.max_tokens:
            end = EngineEnd.LENGTH
        if end is not None:
            del self.running[submission.request_id]
        return EngineOutput(submission.request_id, (token,), now_s, end)

    def _progress(self) -> Iterator[RequestProgress]:
        for running in self.running.values():
            submission = running.submission
            yield RequestProgress(
                request_id=submission.request_id,
                attempt=submission.attempt,
                application=submission.application,
                tier=submission.tiers[0],
                promised=submission.promised,
                started=running.scheduled_at_s is not None,
                prompt_tokens=len(submission.token_ids),
                computed_tokens=0 if running.held_back else len(submission.token_ids) + running.produced,
                output_tokens=running.produced,
                forecast_tokens=submission.sampling.max_tokens - running.produced,
                max_tokens=submission.sampling.max_tokens,
                ttft_deadline_s=submission.ttft_deadline_s,
                next_deadline_s=submission.ttft_deadline_s,
                tpot_s=submission.stages[0].tpot_s,
                scheduled_at_s=running.scheduled_at_s,
            )
