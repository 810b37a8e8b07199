"""`python -m bench flood`: ten times the load for twenty seconds, ten thousand open streams, clients that do not read.

On the real stack with emulated replicas: what was promised stays promised, what is shed is told when to come back, and
the services' memory stays bounded.
"""

import asyncio
import json
import resource
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer
from google.protobuf import any_pb2
from rich.console import Console
from rich.table import Table

from bench.fault_load import Answer, FaultLoad, Shape, tally
from bench.fault_state import Leftovers, leftovers
from bench.flood_streams import Streams, open_streams, slow_readers
from bench.metrics import quantile
from bench.task_watch import TaskWatch
from protos import types_pb2
from services.cli.stack import LocalStack
from services.cli.stack_layout import process_names
from services.cli.stack_spec import StackSpec
from services.client import SlosClient
from services.client.requests import OnInfeasible
from services.common.errors import SloServeError

__all__ = ["Wave", "judge", "main"]

_BASE = Shape(
    rate_rps=4.0,
    prompt_tokens=(50, 400),
    output_tokens=(30, 120),
    on_infeasible=("REJECT",),
    resume_grace_s=0.0,
)
_SERVICES = ("admission-0", "router-0", "planner-0")
_HOLD_S = 60.0


@dataclass(frozen=True, slots=True)
class Wave:
    """One wave of load and what became of it.

    `shed_by` counts the refusals by reason and by what ran out; `delays_ms` is what they were told: p10, p50, p90, the
    longest. `came_back` are those that came back once, when told to, and how that ended.
    """

    name: str
    counts: dict[str, int]
    promised: int
    kept: int
    shed: int
    shed_with_delay: int
    shed_by: dict[str, int]
    delays_ms: tuple[float, float, float, float]
    came_back: dict[str, int]

    @property
    def whole(self) -> bool:
        """Everybody was answered, and no token was wrong."""
        return not any(self.counts[what] for what in ("unanswered", "wrong tokens", "failed"))


@dataclass(frozen=True, slots=True)
class Report:
    """What a flood did. `memory_mib`: by service, before, at its highest, and after."""

    waves: list[Wave]
    streams: Streams
    slow_complete: int
    slow: int
    memory_mib: dict[str, tuple[float, float, float]]
    left: Leftovers

    @property
    def clean(self) -> bool:
        """Every refusal carried a reason and a delay, every promised answer was whole, nothing is left behind."""
        told = all(wave.whole and wave.shed == wave.shed_with_delay for wave in self.waves)
        return told and self.streams.clean and self.left.none


class _Returning(FaultLoad):
    """Clients that come back once when they are told to; `again` holds those second tries."""

    def __init__(self, addresses: Sequence[str], shape: Shape, *, name: str, seed: int) -> None:
        super().__init__(addresses, shape, name=name, seed=seed)
        self.again: list[Answer] = []

    async def _one(self, client: SlosClient, answer: Answer, application: str, policy: OnInfeasible) -> None:
        await super()._one(client, answer, application, policy)
        delay_ms = answer.error.retry_after_ms if answer.error is not None and not answer.ids else None
        if delay_ms is not None:
            await asyncio.sleep(delay_ms / 1000)
            again = Answer(f"{answer.request_id}-again", answer.prompt_ids, answer.wanted, time.monotonic())
            self.again.append(again)
            await super()._one(client, again, application, policy)


class _Peak:
    """The highest resident memory of the control services."""

    def __init__(self, stack: LocalStack) -> None:
        self._pids = {name: stack.process(name).pid for name in _SERVICES}
        self.first = self.now()
        self.highest = dict(self.first)

    def now(self) -> dict[str, float]:
        return {name: psutil.Process(pid).memory_info().rss / 2**20 for name, pid in self._pids.items()}

    async def watch(self) -> None:
        while True:
            for name, mib in self.now().items():
                self.highest[name] = max(self.highest[name], mib)
            await asyncio.sleep(0.5)


async def _wave(stack: LocalStack, name: str, shape: Shape, seconds: float, seed: int) -> Wave:
    load = _Returning(stack.addresses.admission, shape, name=name, seed=seed)
    await load.run(seconds)
    return judge(name, load.answers, load.again)


def judge(name: str, answers: Sequence[Answer], again: Sequence[Answer]) -> Wave:
    """What became of a wave; `again` are the second tries of those that came back."""
    shed = [answer.error for answer in answers if answer.error is not None and not answer.ids]
    delays_ms = sorted(error.retry_after_ms for error in shed if error.retry_after_ms)
    promised, kept = _promises(answers)
    came_back, kept_then = _promises(again)
    p10, p50, p90, longest = (quantile(delays_ms, level) for level in (0.1, 0.5, 0.9, 1.0))
    return Wave(
        name=name,
        counts=tally([*answers, *again]) | {"requests": len(answers), "complete": sum(a.complete for a in answers)},
        promised=promised,
        kept=kept,
        shed=len(shed),
        shed_with_delay=len(delays_ms),
        shed_by=dict(Counter(_why(error) for error in shed).most_common()),
        delays_ms=(p10, p50, p90, longest),
        came_back={"came back": len(again), "promised": came_back, "kept": kept_then},
    )


def _promises(answers: Sequence[Answer]) -> tuple[int, int]:
    """Given and kept."""
    promised = [answer.finished for answer in answers if answer.finished is not None and answer.finished.promised]
    return len(promised), sum(finished.met for finished in promised)


def _why(error: SloServeError) -> str:
    """The reason, and the constraint of the verdict in its details."""
    verdict = types_pb2.Verdict()
    for detail in error.details:
        if isinstance(detail, any_pb2.Any) and detail.Unpack(verdict):
            kind = types_pb2.ConstraintKind.Name(verdict.constraint.kind).removeprefix("CONSTRAINT_KIND_")
            return f"{error.reason.value} {kind}"
    return error.reason.value


async def flood(replicas: int, streams: int, seconds: float, data_dir: Path, console: Console) -> Report:
    """Run all of it."""
    spec = StackSpec(data_dir=data_dir, engine="emulated", preset="opt-6.7b-a100", num_workers=replicas)
    async with AsyncExitStack() as cleanup:
        tasks = await cleanup.enter_async_context(TaskWatch(process_names(spec)))
        stack = await cleanup.enter_async_context(LocalStack(replace(spec, service_environment=tasks.environments)))
        peak = _Peak(stack)
        watching = asyncio.create_task(peak.watch())
        base = replace(_BASE, rate_rps=_BASE.rate_rps * replicas)
        waves = [await _wave(stack, "before", base, 10.0, 1)]
        await tasks.learn_idle()
        console.print(f"flood: {10 * base.rate_rps:g} requests/s for {seconds:g} s")
        waves.append(await _wave(stack, "flood", replace(base, rate_rps=10 * base.rate_rps), seconds, 2))
        waves.append(await _wave(stack, "after", base, 10.0, 3))
        slow = 50
        console.print(f"{slow} clients that read nothing for 5 s")
        slow_complete = await slow_readers(stack.admission_address, slow)
        console.print(f"{streams} open streams")
        crowd = await open_streams(stack.admission_address, streams, _HOLD_S)
        left = await leftovers(stack, tasks)
        for _ in range(60):
            if left.none:
                break
            await asyncio.sleep(1.0)
            left = await leftovers(stack, tasks)
        watching.cancel()
        last = peak.now()
        memory = {name: (peak.first[name], peak.highest[name], last[name]) for name in _SERVICES}
    return Report(waves, crowd, slow_complete, slow, memory, left)


def show(report: Report, console: Console) -> None:
    """The tables."""
    table = Table(title="flood", title_justify="left", box=None)
    for header in ("wave", "requests", "complete", "promised", "kept", "shed", "with a delay", "failed"):
        table.add_column(header, justify="right")
    for wave in report.waves:
        counts = wave.counts
        numbers = (counts["requests"], counts["complete"], wave.promised, wave.kept, wave.shed, wave.shed_with_delay)
        table.add_row(wave.name, *map(str, numbers), str(counts["failed"]))
    console.print(table)
    for wave in report.waves:
        if wave.shed:
            told = "/".join(f"{ms:.0f}" for ms in wave.delays_ms)
            _say(
                console,
                f"{wave.name}, turned away: {wave.shed_by}; told to come back after {told} ms (p10/p50/p90/max)",
            )
            _say(console, f"{wave.name}, of those that came back then: {wave.came_back}")
    _say(console, f"slow readers with a whole answer: {report.slow_complete} of {report.slow}")
    streams = report.streams
    _say(console, f"{streams.wanted} streams wanted at once, {streams.most_open} of them open at the same time")
    answered = "/".join(f"{seconds:.1f}" for seconds in streams.answered_s)
    _say(console, f"their verdicts after {answered} s (p50/p90/last); told to come back later {streams.refused} times")
    _say(console, f"how they ended: {streams.ended}; without a reason: {streams.without_reason}")
    for name, (first, highest, last) in report.memory_mib.items():
        _say(console, f"{name}: {first:.0f} MiB, at most {highest:.0f}, then {last:.0f}")
    _say(console, f"left behind: {asdict(report.left)}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def main(
    replicas: Annotated[int, typer.Option(min=1, max=8)] = 2,
    streams: Annotated[int, typer.Option(min=1, help="Streams open at the same time.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=1, help="How long ten times the load lasts.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
) -> None:
    """Ten times the load, slow readers and very many streams; status 1 where a promise or a delay was missing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > soft else soft, hard))
    console = Console()
    with TemporaryDirectory(prefix="slos-flood-") as temporary:
        report = asyncio.run(flood(replicas, streams, seconds, Path(temporary), console))
    show(report, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.clean else 1)
