"""`python -m bench soak`: random faults under load, then a table of what they cost.

Four replicas of the emulated engine, two admissions, two routers and a planner. Every few seconds something is killed,
or stopped past its lease and woken, drawn with a seed, and brought back. Each answer is compared with the tokens its
prompt must give; runs are counted from the workers' spans, and at the end nothing may be left in a queue or an engine,
nor any task in a service beyond those it has when idle.
"""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.fault_load import Answer, FaultLoad, Shape, tally
from bench.fault_state import Leftovers, Memory, leftovers, runs_twice
from bench.task_watch import TaskWatch
from services.cli.stack import LocalStack
from services.cli.stack_layout import process_names
from services.cli.stack_spec import StackSpec

__all__ = ["main"]

_PAUSE_S = 5.0  # longer than a lease
_SETTLE_S = 90.0
_GAP_S = (3.0, 9.0)
_WARM_UP_S = 3.0  # of load, before the services are looked at as idle

_WEIGHTS = {
    "worker killed": 4,
    "engine killed": 3,
    "worker stopped past its lease": 3,
    "worker drained": 1,
    "router killed": 2,
    "planner killed": 2,
    "admission killed": 2,
    "redis killed": 1,
}


@dataclass
class Report:
    """What a soak found; `counts` is of `tally`."""

    minutes: float
    seed: int
    counts: dict[str, int]
    faults: dict[str, int]
    duplicated_runs: int
    left: Leftovers
    memory: list[Memory]
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Nothing lost, repeated, run twice or left behind."""
        counts = self.counts
        bad = counts["tokens lost"] + counts["tokens repeated"] + counts["wrong tokens"] + counts["unanswered"]
        return not bad and not self.duplicated_runs and self.left.none


class Faults:
    """Breaks one thing after the other. At least one replica of the fleet is always left alone."""

    def __init__(self, stack: LocalStack, seed: int) -> None:
        self._stack = stack
        self._source = random.Random(seed)
        self._down: set[str] = set()
        self._mending: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    async def until(self, end_s: float) -> None:
        """Break things until then; returns once all is up again."""
        while time.monotonic() < end_s:
            await asyncio.sleep(self._source.uniform(*_GAP_S))
            kind = self._source.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
            role = kind.split()[0].replace("engine", "worker")
            up = [name for name in self._stack.process_names if name.startswith(role) and name not in self._down]
            spare = 0 if role in ("planner", "redis") else 1
            if len(up) <= spare or (role == "redis" and self._down):
                continue
            name = self._source.choice(up)
            self._down.add(name)
            self.counts[kind] += 1
            task = asyncio.create_task(self._break(kind, name), name=f"{kind}: {name}")
            self._mending.add(task)
            task.add_done_callback(self._mending.discard)
            if role == "redis":
                await task
        await asyncio.gather(*self._mending)

    async def _break(self, kind: str, name: str) -> None:
        stack = self._stack
        match kind:
            case "engine killed":
                stack.kill_engine(name)
                await stack.process(name).wait_ended()
            case "worker stopped past its lease":
                stack.pause(name)
                await asyncio.sleep(_PAUSE_S)
                stack.go_on(name)
                self._down.discard(name)
                return
            case "worker drained":
                await stack.terminate(name)
            case _:
                await stack.kill(name)
                await asyncio.sleep(self._source.uniform(0.2, 2.0))
        await stack.restart(name)
        self._down.discard(name)


async def soak(minutes: float, seed: int, rate_rps: float, replicas: int, data_dir: Path, console: Console) -> Report:
    """Run it and report."""
    spec = StackSpec(
        data_dir=data_dir,
        engine="emulated",
        preset="opt-6.7b-a100",
        num_workers=replicas,
        num_admissions=2,
        num_routers=2,
        drain_grace_s=20.0,
    )
    async with AsyncExitStack() as cleanup:
        tasks = await cleanup.enter_async_context(TaskWatch(process_names(spec)))
        stack = await cleanup.enter_async_context(LocalStack(replace(spec, service_environment=tasks.environments)))
        await FaultLoad(stack.addresses.admission, Shape(rate_rps), name="warm", seed=seed).run(_WARM_UP_S)
        await _settled(lambda: leftovers(stack))
        await tasks.learn_idle()
        console.print(f"{replicas} replicas up; {minutes:g} minutes of faults, seed {seed}")
        load = FaultLoad(stack.addresses.admission, Shape(rate_rps), name="soak", seed=seed)
        faults = Faults(stack, seed)
        memory = MemoryWatch(stack)
        seconds = minutes * 60
        progress = asyncio.create_task(_progress(load, faults, console))
        watching = asyncio.create_task(memory.watch())
        await asyncio.gather(load.run(seconds), faults.until(time.monotonic() + seconds - 10))
        await stack.wait_for_replicas(replicas, timeout_s=_SETTLE_S)
        left = await _settled(lambda: leftovers(stack, tasks))
        for task in (progress, watching):
            task.cancel()
        await asyncio.gather(progress, watching, return_exceptions=True)
        grown = memory.grown()
    return Report(
        minutes=minutes,
        seed=seed,
        counts=tally(load.answers),
        faults=dict(faults.counts),
        duplicated_runs=runs_twice(data_dir),
        left=left,
        memory=grown,
        errors=_errors(load.answers),
    )


class MemoryWatch:
    """Resident memory of every process of the stack since its last start."""

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack
        self._seen: dict[str, Memory] = {}

    async def watch(self) -> None:
        """Look every two seconds until cancelled."""
        while True:
            for name in self._stack.process_names:
                if name != "redis" and (pid := self._stack.process(name).pid) is not None:
                    self._seen[name] = Memory.look(name, pid, self._seen.get(name))
            await asyncio.sleep(2.0)

    def grown(self) -> list[Memory]:
        """The last look at each."""
        return [self._seen[name] for name in sorted(self._seen)]


async def _settled(look: Callable[[], Awaitable[Leftovers]]) -> Leftovers:
    """What is left once nothing changes for the better any more, at most a minute later."""
    end_s = time.monotonic() + 60.0
    while True:
        left = await look()
        if left.none or time.monotonic() > end_s:
            return left
        await asyncio.sleep(1.0)


async def _progress(load: FaultLoad, faults: Faults, console: Console) -> None:
    began_s = time.monotonic()
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(20.0)
            done = sum(answer.done for answer in load.answers)
            broken = sum(faults.counts.values())
            console.print(
                f"{time.monotonic() - began_s:5.0f} s   {done}/{len(load.answers)} answered   {broken} faults",
                highlight=False,
            )


def _errors(answers: Sequence[Answer]) -> dict[str, int]:
    return dict(Counter(answer.error.reason.value for answer in answers if answer.error is not None).most_common())


def show(report: Report, console: Console) -> None:
    """The table."""
    table = Table(title=f"soak: {report.minutes:g} minutes, seed {report.seed}", title_justify="left", box=None)
    table.add_column("what")
    table.add_column("how many", justify="right")
    for name, number in report.faults.items():
        table.add_row(f"fault: {name}", str(number))
    for name, number in report.counts.items():
        table.add_row(name, f"{number:,}")
    for name, number in report.errors.items():
        table.add_row(f"status {name}", str(number))
    table.add_row("duplicated runs", str(report.duplicated_runs))
    for name, value in asdict(report.left).items():
        table.add_row(f"left: {name.replace('_', ' ')}", str(sum(value.values()) if name == "tasks" else value))
    for name, number in report.left.tasks.items():
        table.add_row(f"left: task of {name}", str(number))
    for one in report.memory:
        table.add_row(
            f"memory of {one.name}, MiB", f"{one.first_mib:.0f} -> {one.last_mib:.0f} in {one.seconds / 60:.1f} min"
        )
    console.print(table)


def main(
    minutes: Annotated[float, typer.Option(min=0.2, help="How long faults and load last.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the faults and of the load.")] = 1,
    rate_rps: Annotated[float, typer.Option("--rate", help="Requests per second.")] = 6.0,
    replicas: Annotated[int, typer.Option(min=2, max=16)] = 4,
    data_dir: Annotated[Path | None, typer.Option(help="Keep logs and spans here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON here.")] = None,
) -> None:
    """Random faults under load on the real stack; ends with a table, and status 1 where anything was lost."""
    console = Console()
    with TemporaryDirectory(prefix="slos-soak-") as temporary:
        report = asyncio.run(soak(minutes, seed, rate_rps, replicas, data_dir or Path(temporary), console))
    show(report, console)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if report.clean else 1)
