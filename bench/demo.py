"""`make run`: the whole system on this machine, half a minute of recorded traffic, what it promised and delivered."""

import asyncio
import signal
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from huggingface_hub import hf_hub_download
from rich.console import Console

from bench.demo_guide import print_guide
from bench.demo_live import LiveDisplay
from bench.demo_outcome import Outcome, Progress, summarise
from bench.demo_start import StartDisplay
from bench.demo_table import render_tables
from bench.demo_trace import completed_trace, most_telling
from bench.demo_traffic import send_all
from bench.demo_workload import DemoWorkload, demo_workload
from bench.prompts import load_prompt_maker
from services.cli.ports import PortInUseError
from services.cli.replicas import list_replicas, replica_table
from services.cli.run_file import DataDirInUseError
from services.cli.service_process import ServiceFailedError
from services.cli.stack import LocalStack
from services.cli.stack_spec import BUNDLED_MODEL, StackSpec
from services.cli.waterfall import render_waterfall
from services.common.embedded_redis import EmbeddedRedisError

__all__ = ["main"]

_CPU_LENGTH_DIVISOR = 4.0
_MAX_ERRORS_SHOWN = 5
_EXIT_INTERRUPTED = 130

_T = TypeVar("_T")


def main(
    engine: Annotated[Literal["vllm", "emulated"], typer.Option(help="Real vLLM, or an emulated GPU.")] = "vllm",
    model: Annotated[str, typer.Option(help="Directory or hub id.")] = str(BUNDLED_MODEL),
    preset: Annotated[str | None, typer.Option(help="Which GPU and model to emulate.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=16)] = 1,
    port: Annotated[int, typer.Option(min=1, max=65000, help="Admission; the others follow it.")] = 50051,
    data_dir: Annotated[Path, typer.Option(help="Redis data, logs, traces, profiles.")] = Path(".slos"),
    redis_url: Annotated[str | None, typer.Option(help="Default: an embedded server.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End after the table.")] = False,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long requests arrive.")] = 30.0,
    load: Annotated[float, typer.Option(min=0.1, max=50, help="2 sends twice the requests.")] = 1.0,
) -> None:
    """Start everything, send recorded traffic, show promised against delivered, keep serving until Ctrl-C."""
    spec = StackSpec(
        data_dir=data_dir,
        engine=engine,
        model=model,
        preset=preset,
        num_workers=workers,
        base_port=port,
        redis_url=redis_url,
    )
    divisor = _CPU_LENGTH_DIVISOR if engine == "vllm" else 1.0
    workload = demo_workload(seconds, length_divisor=divisor, load=load, max_prompt_tokens=6000, max_output_tokens=1500)
    console = Console(highlight=False)
    try:
        answered = asyncio.run(_run(console, spec, workload, once=once))
    except (ServiceFailedError, PortInUseError, DataDirInUseError, EmbeddedRedisError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    except asyncio.CancelledError:
        console.print("stopped")
        raise typer.Exit(_EXIT_INTERRUPTED if once else 0) from None
    if once and not answered:
        raise typer.Exit(1)


async def _run(console: Console, spec: StackSpec, workload: DemoWorkload, *, once: bool) -> bool:
    """True where every request was answered."""
    began_s = time.monotonic()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one cuts the draining short
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    display = StartDisplay(console, spec.data_dir / "logs")
    stack = LocalStack(spec, display.on_event)
    _headline(console, spec)
    with display:
        await stack.__aenter__()
    try:
        console.print(f"ready after {time.monotonic() - began_s:.1f} s, logs in {spec.data_dir / 'logs'}\n")
        outcomes = await _while_all_run(stack, _traffic(console, stack, workload))
        await _show_trace(console, spec, outcomes)
        if not once:
            print_guide(console, stack.admission_address, spec.data_dir)
            console.print("\nserving on [bold]" + stack.admission_address + "[/]; Ctrl-C stops", style="green")
            raise ServiceFailedError(await stack.wait_for_failure())
    except asyncio.CancelledError:
        console.print("\nstopping: open requests may finish; Ctrl-C again cuts that short")
        raise
    finally:
        await stack.__aexit__(None, None, None)
    return all(outcome.progress is Progress.ANSWERED for outcome in outcomes)


async def _while_all_run(stack: LocalStack, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`; ServiceFailedError as soon as a service ends, because requests wait for it in vain."""
    failure, working = asyncio.create_task(stack.wait_for_failure()), asyncio.create_task(work)
    try:
        await asyncio.wait((failure, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ServiceFailedError(failure.result())
        return working.result()
    finally:
        for task in (failure, working):
            task.cancel()
        await asyncio.gather(failure, working, return_exceptions=True)


def _headline(console: Console, spec: StackSpec) -> None:
    name = Path(spec.model).name if Path(spec.model).is_dir() else spec.model
    what = f"vLLM with {name}" if spec.engine == "vllm" else f"emulated engine {spec.preset or '(default preset)'}"
    console.print(f"[bold]SLOs-Serve[/]: Redis, admission, router, planner, {spec.num_workers} x {what}")


def _tokenizer_file(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model) / "tokenizer.json"
    return Path(hf_hub_download(model, "tokenizer.json"))  # admission has fetched it already


async def _traffic(console: Console, stack: LocalStack, workload: DemoWorkload) -> Sequence[Outcome]:
    console.print(replica_table(await list_replicas(stack.router_address)))
    shorter = f", lengths divided by {workload.length_divisor:g}" if workload.length_divisor != 1 else ""
    console.print(
        f"\n[bold]{len(workload.requests)} requests[/] of three applications, as recorded in Azure's 2023 traces and "
        f"arXiv summaries: arrivals {workload.stretch:.1f} x slower{shorter}"
    )
    outcomes = [Outcome(request) for request in workload.requests]
    prompts = load_prompt_maker(_tokenizer_file(stack.spec.model))
    with LiveDisplay(console, outcomes, workload.seconds) as live:
        await send_all(stack.admission_address, outcomes, prompts, live.tick)
    console.print()
    console.print(render_tables(summarise(outcomes)))
    _show_errors(console, outcomes)
    return outcomes


def _show_errors(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Every failure and every broken promise, up to a few."""
    lines = [f"{outcome.request.application}: {outcome.error}" for outcome in outcomes if outcome.error]
    lines += [line for outcome in outcomes for line in outcome.broken_promises()]
    if lines:
        console.print()
    for line in lines[:_MAX_ERRORS_SHOWN]:
        console.print(line, style="red", markup=False)
    if len(lines) > _MAX_ERRORS_SHOWN:
        console.print(f"... and {len(lines) - _MAX_ERRORS_SHOWN} more", style="red")


async def _show_trace(console: Console, spec: StackSpec, outcomes: Sequence[Outcome]) -> None:
    chosen = most_telling(outcomes)
    if chosen is None or chosen.finished is None:
        return
    spans = await completed_trace(spec.data_dir / "traces", chosen.finished.trace_id)
    console.print(f"\n[bold]One of them[/], a {chosen.request.application} request, through all four services:")
    if spans:
        console.print(render_waterfall(spans, width=console.width))
    else:
        console.print("its spans are not in the local files (an OTLP endpoint is configured?)", style="dim")
