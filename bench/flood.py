"""`python -m bench flood`: ten times the load for twenty seconds, ten thousand open streams, clients that do not read.

On the real stack with emulated replicas: what was promised stays promised, what is shed is told when to come back, and
the services' memory stays bounded.
"""

import asyncio
import json
import random
import resource
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import grpc
import grpc.aio
import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench.fault_load import Answer, FaultLoad, Shape, tally
from bench.fault_state import Leftovers, leftovers
from bench.metrics import quantile
from bench.task_watch import TaskWatch
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.cli.stack import LocalStack
from services.cli.stack_layout import process_names
from services.cli.stack_spec import StackSpec
from services.common.errors import from_rpc_error

__all__ = ["main"]

_BASE = Shape(
    rate_rps=4.0,
    prompt_tokens=(50, 400),
    output_tokens=(30, 120),
    on_infeasible=("REJECT",),
    resume_grace_s=0.0,
)
_SERVICES = ("admission-0", "router-0", "planner-0")
_STREAMS_PER_CHANNEL = 1000


@dataclass(frozen=True, slots=True)
class Wave:
    """One wave of load and what became of it. `shed_by` counts the refusals by reason; `delays_ms`: p10, p50, p90."""

    name: str
    counts: dict[str, int]
    promised: int
    kept: int
    shed: int
    shed_with_delay: int
    shed_by: dict[str, int]
    delays_ms: tuple[float, float, float]
    longest_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a flood did. `memory_mib`: by service, before, at its highest, and after."""

    waves: list[Wave]
    streams: int
    streams_ended: dict[str, int]
    slow_complete: int
    slow: int
    memory_mib: dict[str, tuple[float, float, float]]
    left: Leftovers

    @property
    def clean(self) -> bool:
        """Every refusal carried a delay, every promised answer was whole, nothing is left behind."""
        whole = all(not (w.counts["unanswered"] or w.counts["wrong tokens"] or w.counts["failed"]) for w in self.waves)
        return whole and all(w.shed == w.shed_with_delay for w in self.waves) and self.left.none


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
    load = FaultLoad(stack.addresses.admission, shape, name=name, seed=seed)
    began_s = time.monotonic()
    await load.run(seconds)
    return _judge(name, load.answers, time.monotonic() - began_s)


def _judge(name: str, answers: list[Answer], seconds: float) -> Wave:
    promised = [a for a in answers if a.finished is not None and a.finished.promised]
    shed = [a for a in answers if a.error is not None and not a.ids]
    delays = sorted(a.error.retry_after_ms for a in shed if a.error is not None and a.error.retry_after_ms)
    return Wave(
        name=name,
        counts=tally(answers),
        promised=len(promised),
        kept=sum(a.finished is not None and a.finished.met for a in promised),
        shed=len(shed),
        shed_with_delay=len(delays),
        shed_by=dict(Counter(a.error.reason.value for a in shed if a.error is not None)),
        delays_ms=(quantile(delays, 0.1), quantile(delays, 0.5), quantile(delays, 0.9)),
        longest_s=seconds,
    )


def _request(source: random.Random, tokens: int) -> admission_pb2.GenerateRequest:
    return admission_pb2.GenerateRequest(
        application="summarizer",
        token_ids=admission_pb2.TokenIds(ids=[source.randint(20, 3500) for _ in range(20)]),
        sampling=types_pb2.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )


async def _open_streams(address: str, count: int, hold_s: float) -> Counter[str]:
    """Open `count` streams at once, hold them all, then hang up; how each stood then."""
    source, ended = random.Random(7), Counter[str]()
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-count // _STREAMS_PER_CHANNEL))
    ]

    async def one(number: int) -> None:
        stub = admission_pb2_grpc.AdmissionStub(channels[number // _STREAMS_PER_CHANNEL])
        call = stub.Generate(_request(source, 400))
        try:
            async with asyncio.timeout(hold_s):
                async for event in call:
                    if event.WhichOneof("event") == "finished":
                        ended["finished"] += 1
                        return
        except TimeoutError:
            ended["hung up by the client"] += 1
        except grpc.aio.AioRpcError as error:
            typed = from_rpc_error(error)
            delay = "with a delay" if typed.retry_after_ms else "without a delay"
            ended[f"{error.code().name} {delay}"] += 1
        finally:
            call.cancel()

    await asyncio.gather(*(one(number) for number in range(count)))
    for channel in channels:
        await channel.close()
    return ended


async def _slow_readers(address: str, count: int) -> int:
    """Clients that read nothing for five seconds; how many have their whole answer in the end."""
    source = random.Random(9)

    async def one() -> bool:
        async with grpc.aio.insecure_channel(address) as channel:
            call = admission_pb2_grpc.AdmissionStub(channel).Generate(_request(source, 200), timeout=120)
            tokens, first = 0, True
            async for event in call:
                if event.WhichOneof("event") == "tokens":
                    tokens += len(event.tokens.ids)
                if first:
                    await asyncio.sleep(5.0)
                    first = False
            return tokens == 200

    return sum(await asyncio.gather(*(one() for _ in range(count))))


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
        slow_complete = await _slow_readers(stack.admission_address, slow)
        console.print(f"{streams} open streams")
        ended = await _open_streams(stack.admission_address, streams, 30.0)
        left = await leftovers(stack, tasks)
        for _ in range(60):
            if left.none:
                break
            await asyncio.sleep(1.0)
            left = await leftovers(stack, tasks)
        watching.cancel()
        last = peak.now()
        memory = {name: (peak.first[name], peak.highest[name], last[name]) for name in _SERVICES}
    return Report(waves, streams, dict(ended), slow_complete, slow, memory, left)


def show(report: Report, console: Console) -> None:
    """The tables."""
    table = Table(title="flood", title_justify="left", box=None)
    for header in (
        "wave",
        "requests",
        "complete",
        "promised",
        "kept",
        "shed",
        "with a delay",
        "p10/p50/p90 ms",
        "failed",
    ):
        table.add_column(header, justify="right")
    for wave in report.waves:
        counts = wave.counts
        table.add_row(
            wave.name,
            *(str(number) for number in (counts["requests"], counts["complete"], wave.promised, wave.kept)),
            *(
                str(wave.shed),
                str(wave.shed_with_delay),
                "/".join(f"{ms:.0f}" for ms in wave.delays_ms),
                str(counts["failed"]),
            ),
        )
    console.print(table)
    for wave in report.waves:
        if wave.shed:
            console.print(f"{wave.name}, turned away: {wave.shed_by}", highlight=False)
    console.print(f"slow readers with a whole answer: {report.slow_complete} of {report.slow}", highlight=False)
    console.print(f"{report.streams} open streams: {report.streams_ended}", highlight=False)
    for name, (first, highest, last) in report.memory_mib.items():
        console.print(f"{name}: {first:.0f} MiB, at most {highest:.0f}, then {last:.0f}", highlight=False)
    console.print(f"left behind: {asdict(report.left)}", highlight=False)


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
