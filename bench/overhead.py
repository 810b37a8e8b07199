"""`python -m bench overhead`: what the services add to a bare engine, in one run.

The same open-loop arrivals go to plain AsyncLLM in this process and to the full stack (admission, router, planner,
worker, Redis with an append-only file), both over the emulated engine with the same modelled time per step, in
alternating rounds. Reported are TTFT and time per token of each and the difference of their quantiles, the memory of
the services' processes, and how the full stack kept its promises meanwhile.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import grpc.aio
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from bench.bare_engine import BareEngine
from bench.prompts import PromptMaker, load_prompt_maker
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.cli.stack import LocalStack
from services.cli.stack_spec import BUNDLED_MODEL, StackSpec

__all__ = ["main"]

_VOCAB_SIZE = 4096


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
    met: bool | None = None


Send = Callable[[str, tuple[int, ...], int], AsyncIterator[int]]


async def _timed(steps: AsyncIterator[int]) -> Timing:
    began_s = time.perf_counter()
    first_s = last_s = began_s
    tokens = 0
    async for count in steps:
        last_s = time.perf_counter()
        if tokens == 0:
            first_s = last_s
        tokens += count
    return Timing(first_s - began_s, (last_s - first_s) / max(1, tokens - 1))


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
    async def send(request_id: str, prompt_ids: tuple[int, ...], max_tokens: int) -> AsyncIterator[int]:
        request = admission_pb2.GenerateRequest(
            request_id=request_id,
            token_ids=admission_pb2.TokenIds(ids=prompt_ids),
            application="chatbot",
            sampling=types_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True),
        )
        async for event in stub.Generate(request):
            if event.WhichOneof("event") == "tokens":
                yield len(event.tokens.ids)

    return send


def _memory_mib(stack: LocalStack) -> dict[str, float]:
    sizes = {}
    for name in stack.process_names:
        if name.startswith(("admission", "router", "planner")):
            pid = stack.process(name).pid
            if pid is not None:
                sizes[name] = psutil.Process(pid).memory_info().rss / 2**20
    return sizes


async def _measure(preset_name: str, load: Load, rounds: int, data_dir: Path) -> dict[str, Any]:
    timings: dict[str, list[Timing]] = {"bare": [], "services": []}
    maker = load_prompt_maker(BUNDLED_MODEL / "tokenizer.json")
    async with AsyncExitStack() as exits:
        bare = await exits.enter_async_context(BareEngine(str(BUNDLED_MODEL), preset_name, _VOCAB_SIZE))
        spec = StackSpec(data_dir=data_dir, engine="emulated", preset=preset_name)
        stack = await exits.enter_async_context(LocalStack(spec))
        channel = await exits.enter_async_context(grpc.aio.insecure_channel(stack.admission_address))
        idle = _memory_mib(stack)
        sends: dict[str, Send] = {
            "bare": bare.generate,
            "services": _through_services(admission_pb2_grpc.AdmissionStub(channel)),
        }
        for number in range(rounds + 1):  # the first round warms up and is not counted
            for name, send in sends.items():
                seen = await _round(send, replace(load, seed=load.seed + number), f"{name}-{number}", maker)
                if number > 0:
                    timings[name].extend(seen)
        loaded = _memory_mib(stack)
    return {
        "preset": preset_name,
        "load": asdict(load),
        "rounds": rounds,
        "systems": {name: _quantiles(seen) for name, seen in timings.items()},
        "added_ms": _added(timings),
        "memory_idle_mib": idle,
        "memory_after_mib": loaded,
    }


def _quantiles(seen: list[Timing]) -> dict[str, float]:
    ttft = np.array([timing.ttft_s for timing in seen]) * 1e3
    tpot = np.array([timing.tpot_s for timing in seen]) * 1e3
    return {
        "requests": float(len(seen)),
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "tpot_p50_ms": float(np.percentile(tpot, 50)),
        "tpot_p99_ms": float(np.percentile(tpot, 99)),
    }


def _added(timings: dict[str, list[Timing]]) -> dict[str, float]:
    bare, services = _quantiles(timings["bare"]), _quantiles(timings["services"])
    paired = np.array(
        [ours.ttft_s - plain.ttft_s for ours, plain in zip(timings["services"], timings["bare"], strict=True)]
    )
    return {
        **{key: services[key] - bare[key] for key in bare if key != "requests"},
        "ttft_paired_p50_ms": float(np.percentile(paired, 50)) * 1e3,
        "ttft_paired_p99_ms": float(np.percentile(paired, 99)) * 1e3,
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"services over bare AsyncLLM, emulated {result['preset']}")
    table.add_column("milliseconds")
    for name in ("bare", "services", "added"):
        table.add_column(name, justify="right")
    for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"):
        bare, services = (result["systems"][name][key] for name in ("bare", "services"))
        table.add_row(key.removesuffix("_ms"), f"{bare:.2f}", f"{services:.2f}", f"{result['added_ms'][key]:+.2f}")
    for key in ("ttft_paired_p50_ms", "ttft_paired_p99_ms"):
        table.add_row(key.removesuffix("_ms"), "", "", f"{result['added_ms'][key]:+.2f}")
    return table


def main(
    preset: Annotated[str, typer.Option(help="emulated GPU and model")] = "opt-6.7b-a100",
    rate_rps: Annotated[float, typer.Option(help="arrivals per second")] = 3.0,
    requests: Annotated[int, typer.Option(help="requests per round")] = 60,
    rounds: Annotated[int, typer.Option(help="counted rounds of each system")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="prompt length")] = 400,
    output_tokens: Annotated[int, typer.Option(help="output length")] = 64,
    seed: Annotated[int, typer.Option(help="of arrivals and prompts")] = 1,
    out: Annotated[Path, typer.Option(help="folder of the JSON result")] = Path("bench/results"),
) -> None:
    """Measure what the services add to TTFT and time per token over a bare engine."""
    load = Load(rate_rps, requests, prompt_tokens, output_tokens, seed)
    with TemporaryDirectory(prefix="slos-overhead-") as folder:
        result = asyncio.run(_measure(preset, load, rounds, Path(folder)))
    console = Console()
    console.print(_table(result))
    idle = result["memory_idle_mib"]
    console.print(f"memory idle: {', '.join(f'{name} {mib:.0f} MiB' for name, mib in idle.items())}")
    console.print(f"together {sum(idle.values()):.0f} MiB")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "overhead.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {path}")
