"""`python -m bench overhead`: what the services add to a bare engine, in one run.

The same open-loop arrivals go to plain AsyncLLM in this process and to the full stack (admission, router, planner,
worker, Redis with an append-only file), both over the emulated engine with the same modelled time per step, in
alternating rounds. Reported are TTFT and time per token of each and the difference of their quantiles, the memory of
the services' processes, the CPU time each spends per request, and how many tokens one admission process streams.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import grpc.aio
import numpy as np
import psutil
import typer
from rich.console import Console

from bench.bare_engine import BareEngine
from bench.interruptible import run_interruptible
from bench.machine import MachineShare, machine_share
from bench.prompts import PromptMaker, load_prompt_maker
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.cli.stack import LocalStack
from services.cli.stack_spec import BUNDLED_MODEL, StackSpec
from services.core.presets import preset as preset_of
from services.worker.engine_settings import EngineSettings

__all__ = ["Timing", "added", "main", "quantiles", "tables"]

_VOCAB_SIZE = 4096
_STREAM_PROMPT_TOKENS = 32
_STREAM_OUTPUT_TOKENS = 96
_BARS = {"ttft_p50_ms": "< 5", "ttft_p99_ms": "< 20", "tpot_p50_ms": "< 0.5"}


@dataclass(frozen=True, slots=True)
class Load:
    """Open-loop Poisson arrivals of equal requests."""

    rate_rps: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int

    def arrivals_s(self) -> list[float]:
        """Seconds from the start of a round."""
        source = random.Random(self.seed)
        return list(itertools.accumulate(source.expovariate(self.rate_rps) for _ in range(self.requests)))


@dataclass(frozen=True, slots=True)
class Timing:
    """What one request's client saw."""

    ttft_s: float
    tpot_s: float
    tokens: int
    ended_s: float


@dataclass(slots=True)
class System:
    """One system and what was seen of it."""

    send: "Send"
    timings: list[Timing] = field(default_factory=list)
    shares: list[MachineShare] = field(default_factory=list)


Send = Callable[[str, tuple[int, ...], int], AsyncIterator[tuple[int, ...]]]


async def _timed(steps: AsyncIterator[tuple[int, ...]]) -> Timing:
    began_s = time.perf_counter()
    first_s = last_s = began_s
    tokens = 0
    async for ids in steps:
        last_s = time.perf_counter()
        if tokens == 0:
            first_s = last_s
        tokens += len(ids)
    return Timing(first_s - began_s, (last_s - first_s) / max(1, tokens - 1), tokens, last_s)


async def _round(send: Send, load: Load, name: str, maker: PromptMaker) -> list[Timing]:
    loop = asyncio.get_running_loop()
    prompts = [
        tuple(maker.random_ids(load.prompt_tokens, load.seed * 100_003 + index)) for index in range(load.requests)
    ]
    began_s = loop.time()

    async def one(index: int, at_s: float) -> Timing:
        await asyncio.sleep(max(0.0, began_s + at_s - loop.time()))
        return await _timed(send(f"{name}-{index}", prompts[index], load.output_tokens))

    calls: list[Awaitable[Timing]] = [one(index, at_s) for index, at_s in enumerate(load.arrivals_s())]
    return list(await asyncio.gather(*calls))


def _through_services(stub: "admission_pb2_grpc.AdmissionAsyncStub") -> Send:
    async def send(request_id: str, prompt_ids: tuple[int, ...], max_tokens: int) -> AsyncIterator[tuple[int, ...]]:
        request = admission_pb2.GenerateRequest(
            token_ids=admission_pb2.TokenIds(ids=prompt_ids),
            application="chatbot",
            sampling=types_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True),
        )
        async for event in stub.Generate(request):
            if event.WhichOneof("event") == "tokens":
                yield tuple(event.tokens.ids)

    return send


def _memory_mib(stack: LocalStack) -> dict[str, float]:
    sizes = {}
    for name in stack.process_names:
        if name.startswith(("admission", "router", "planner")):
            pid = stack.process(name).pid
            if pid is not None:
                sizes[name] = psutil.Process(pid).memory_info().rss / 2**20
    return sizes


async def _measure(settings: EngineSettings, load: Load, rounds: int, streams: int) -> dict[str, Any]:
    maker = load_prompt_maker(BUNDLED_MODEL / "tokenizer.json")
    async with AsyncExitStack() as exits:
        scheduling = "on" if settings.async_scheduling else "off"
        spec = StackSpec(
            data_dir=settings.data_dir,
            engine="emulated",
            preset=settings.preset,
            service_environment={"worker": {"SLOS_ASYNC_SCHEDULING": scheduling}},
        )
        stack = await exits.enter_async_context(LocalStack(spec))
        idle = _memory_mib(stack)
        bare = await exits.enter_async_context(BareEngine(settings, _VOCAB_SIZE))
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(stack.admission_address))
        through = _through_services(admission_pb2_grpc.AdmissionStub(channel))
        systems = {"bare": System(bare.generate), "services": System(through)}
        spent: dict[str, float] = {}
        for number in range(rounds + 1):  # the first round warms up and is not counted
            order = list(systems.items())
            for name, system in order if number % 2 == 0 else order[::-1]:
                before = _cpu_s(stack)
                with machine_share() as share:
                    seen = await _round(system.send, replace(load, seed=load.seed + number), f"{name}-{number}", maker)
                if number == 0:
                    continue
                system.timings.extend(seen)
                system.shares.append(share())
                if name == "services":
                    for process, seconds in _cpu_s(stack).items():
                        spent[process] = spent.get(process, 0.0) + seconds - before[process]
        loaded = _memory_mib(stack)
        streaming = await _stream(through, stack, streams, maker)
    timings = {name: system.timings for name, system in systems.items()}
    return {
        "kind": "overhead",
        "settings": {"rounds": rounds, "async_scheduling": bool(settings.async_scheduling), **asdict(load)},
        "systems": {name: quantiles(seen) for name, seen in timings.items()},
        "added_ms": added(timings),
        "memory_idle_mib": idle,
        "memory_after_mib": loaded,
        "cpu_ms_per_request": {name: seconds * 1e3 / (rounds * load.requests) for name, seconds in spent.items()},
        "streaming": streaming,
        "machine": {name: [asdict(share) for share in system.shares] for name, system in systems.items()},
        **provenance(preset_of(settings.preset)),
    }


async def _stream(send: Send, stack: LocalStack, streams: int, maker: PromptMaker) -> dict[str, float]:
    """Many streams at once through one admission process: tokens per second, and per second of its CPU time.

    The second number is what the process could stream with a core for itself; here engine, worker, clients and it
    share the machine.
    """
    before, began_s = _cpu_s(stack), time.perf_counter()
    prompts = [tuple(maker.random_ids(_STREAM_PROMPT_TOKENS, 7_000_003 + index)) for index in range(streams)]
    calls = [_timed(send(f"s-{index}", prompt, _STREAM_OUTPUT_TOKENS)) for index, prompt in enumerate(prompts)]
    seen = await asyncio.gather(*calls)
    seconds = max(timing.ended_s for timing in seen) - began_s
    tokens = sum(timing.tokens for timing in seen)
    cpu_s = _cpu_s(stack)["admission-0"] - before["admission-0"]
    return {
        "streams": float(streams),
        "tokens": float(tokens),
        "tokens_per_s": tokens / seconds,
        "tokens_per_admission_cpu_s": tokens / cpu_s,
    }


def _cpu_s(stack: LocalStack) -> dict[str, float]:
    """CPU seconds of every service; of a worker its engine process apart."""
    found = {}
    for name in stack.process_names:
        pid = None if name == "redis" else stack.process(name).pid
        if pid is None:
            continue
        process = psutil.Process(pid)
        times = process.cpu_times()
        found[name] = times.user + times.system
        children = [child.cpu_times() for child in process.children(recursive=True)]
        if children:
            found[f"{name} engine"] = sum(child.user + child.system for child in children)
    return found


def quantiles(seen: list[Timing]) -> dict[str, float]:
    """Median and 99th percentile of TTFT and time per token, milliseconds."""
    ttft = np.array([timing.ttft_s for timing in seen]) * 1e3
    tpot = np.array([timing.tpot_s for timing in seen]) * 1e3
    return {
        "requests": float(len(seen)),
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "tpot_p50_ms": float(np.percentile(tpot, 50)),
        "tpot_p99_ms": float(np.percentile(tpot, 99)),
    }


def added(timings: dict[str, list[Timing]]) -> dict[str, float]:
    """Services less bare: differences of the quantiles, and quantiles of the differences request by request."""
    bare, services = quantiles(timings["bare"]), quantiles(timings["services"])
    paired = np.array(
        [ours.ttft_s - plain.ttft_s for ours, plain in zip(timings["services"], timings["bare"], strict=True)]
    )
    return {
        **{key: services[key] - bare[key] for key in bare if key != "requests"},
        "ttft_paired_p50_ms": float(np.percentile(paired, 50)) * 1e3,
        "ttft_paired_p99_ms": float(np.percentile(paired, 99)) * 1e3,
    }


def tables(result: dict[str, Any]) -> str:
    """The result in Markdown: times with their bars, then memory, throughput and CPU."""
    rows = []
    for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"):
        bare, services = (result["systems"][name][key] for name in ("bare", "services"))
        row = [key.removesuffix("_ms"), f"{bare:.2f}", f"{services:.2f}", f"{result['added_ms'][key]:+.2f}"]
        rows.append([*row, _BARS.get(key, "")])
    rows.extend(
        [key.removesuffix("_ms"), "", "", f"{result['added_ms'][key]:+.2f}", ""]
        for key in ("ttft_paired_p50_ms", "ttft_paired_p99_ms")
    )
    idle, stream = result["memory_idle_mib"], result["streaming"]
    others = {name: np.mean([share["others"] for share in shares]) for name, shares in result["machine"].items()}
    facts = [
        ["memory idle, " + ", ".join(f"{name} {mib:.0f}" for name, mib in idle.items()) + " MiB, together",
         f"{sum(idle.values()):.0f}", "500"],
        [f"tokens/s, {stream['streams']:.0f} streams, everything on this machine", f"{stream['tokens_per_s']:.0f}", ""],
        ["tokens per second of the admission process's CPU time", f"{stream['tokens_per_admission_cpu_s']:.0f}",
         "10,000"],
        *([f"CPU ms per request, {name}", f"{ms:.1f}", ""] for name, ms in result["cpu_ms_per_request"].items()),
        ["cores used by others meanwhile, bare / services", f"{others['bare']:.2f} / {others['services']:.2f}", ""],
    ]  # fmt: skip
    first = markdown_table(["milliseconds", "bare AsyncLLM", "services", "added", "bar"], rows)
    return first + "\n" + markdown_table(["", "measured", "bar"], facts)


def main(
    preset: Annotated[str, typer.Option(help="emulated GPU and model")] = "opt-6.7b-a100",
    rate_rps: Annotated[float, typer.Option(help="arrivals per second")] = 3.0,
    requests: Annotated[int, typer.Option(help="requests per round")] = 60,
    rounds: Annotated[int, typer.Option(help="counted rounds of each system")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="prompt length")] = 400,
    output_tokens: Annotated[int, typer.Option(help="output length")] = 64,
    async_scheduling: Annotated[bool, typer.Option(help="two batches in flight, vLLM's default on GPUs")] = False,
    streams: Annotated[int, typer.Option(help="streams at once, for tokens per second")] = 256,
    seed: Annotated[int, typer.Option(help="of arrivals and prompts")] = 1,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
) -> None:
    """Measure what the services add to TTFT and time per token over a bare engine."""
    load = Load(rate_rps, requests, prompt_tokens, output_tokens, seed)
    with TemporaryDirectory(prefix="slos-overhead-") as folder:
        settings = EngineSettings(
            engine="emulated",
            model=str(BUNDLED_MODEL),
            preset=preset,
            data_dir=Path(folder),
            async_scheduling=async_scheduling,
        )
        result = run_interruptible(_measure(settings, load, rounds, streams))
    console = Console(highlight=False)
    text = tables(result)
    stem = f"overhead-{preset}{'-async' if async_scheduling else ''}"
    path = write_result(results, stem, result, text)
    console.print(text)
    console.print(f"written: {path} and .md")
