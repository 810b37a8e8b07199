"""`python -m bench live`: the full stack in real time, beside plain vLLM with the same engine.

Every load is sent to both in turn, in one run: the same jobs of a recorded trace at the same times with prompts of the
same seed, open loop, over gRPC to the services and to AsyncLLM with its own scheduler. What counts is what the client
saw. `--saturate` measures throughput instead: everything at once, best effort only. `--virtual` runs the same jobs in
virtual time.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.interruptible import run_interruptible
from bench.live_jobs import Conversations, Scale, live_jobs
from bench.live_report import Measured, attainment_plot, point_json, table
from bench.live_round import Seen, run_round
from bench.live_saturate import saturate
from bench.live_stack import Side, sides
from bench.live_targets import Target
from bench.live_virtual import run_virtual
from bench.metrics import outcome_of
from bench.model_shape import SHAPES, write_shape
from bench.prompts import PromptMaker, load_prompt_maker
from bench.report_files import RESULTS, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, ScenarioFile, load_scenarios
from bench.scenario_jobs import Workload, build_workload
from bench.workload import TRACES, WorkloadError
from services.cli.stack_spec import BUNDLED_MODEL
from services.core.presets import Preset, UnknownPresetError, preset
from services.worker.engine_settings import EngineSettings

__all__ = ["Plan", "main", "measure"]

_CPU_LENGTH_DIVISOR = 4.0
_GRACE_S = 20.0  # after the last deadline, as for capacity in virtual time
_FACTORS = (0.1, 0.2, 0.3)  # of the trace's own rate, where no rates are given

_OF_LOADS = ("rates", "window", "seconds", "repetitions", "length_divisor", "tpot_factor", "stage_tokens", "traces")
"""Options that mean nothing where everything is sent at once, with lengths of its own."""

_NOT_VIRTUAL = ("model", "repetitions", "saturated")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    scenario: str
    rates: tuple[float, ...]
    window: int
    seed: int
    seconds: float
    repetitions: int
    scale: Scale
    traces: Path


def main(
    context: typer.Context,
    engine: Annotated[
        Literal["emulated", "vllm"], typer.Option(help="an emulated GPU, or real vLLM here")
    ] = "emulated",
    preset_name: Annotated[str, typer.Option("--preset", help="emulated hardware and model")] = "opt-6.7b-a100",
    model: Annotated[str, typer.Option(help="directory or hub id")] = str(BUNDLED_MODEL),
    shape: Annotated[str, typer.Option(help=f"of this published model with random weights: {', '.join(SHAPES)}")] = "",
    scenario: Annotated[str, typer.Option(help="one of the file; --saturate: only its prefix caching")] = "mixed",
    rates: Annotated[str, typer.Option(help="jobs/s, comma-separated; empty: 0.1, 0.2, 0.3 of the trace's own")] = "",
    window: Annotated[int, typer.Option(help="index of the window")] = 0,
    seed: Annotated[int, typer.Option()] = 1,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="how long jobs arrive in each round")] = 60.0,
    repetitions: Annotated[int, typer.Option(min=1, help="rounds of each system at each load")] = 1,
    length_divisor: Annotated[float, typer.Option(help="of recorded lengths; 0: 1, on a CPU 4")] = 0.0,
    tpot_factor: Annotated[float, typer.Option(min=0.1, help="of the scenario's TPOTs")] = 1.0,
    stage_tokens: Annotated[int, typer.Option(min=1, help="longest output of a stage")] = 800,
    async_scheduling: Annotated[bool, typer.Option(help="two batches in flight, vLLM's default on GPUs")] = False,
    saturated: Annotated[
        bool, typer.Option("--saturate", help="throughput with best effort only, instead; no load options")
    ] = False,
    virtual: Annotated[
        bool, typer.Option("--virtual", help="the same jobs in virtual time, without engine and services, instead")
    ] = False,
    scenarios: Annotated[Path, typer.Option(help="scenario file")] = SCENARIOS,
    traces: Annotated[Path, typer.Option(help="directory of traces")] = TRACES,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
) -> None:
    """Send recorded traffic to the full stack and to plain vLLM, in real time."""
    console = Console(highlight=False)
    divisor = length_divisor or (_CPU_LENGTH_DIVISOR if engine == "vllm" else 1.0)
    try:
        file = load_scenarios(scenarios)
        file.scenario(scenario)
        preset(preset_name)
        if saturated and (given := [name for name in _OF_LOADS if _given(context, name)]):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--saturate sends everything at once: it takes no {options}")
        if shape and (shape not in SHAPES or engine != "vllm"):
            raise ValueError(f"--shape is for --engine vllm and one of: {', '.join(SHAPES)}")
        wanted = tuple(float(rate) for rate in rates.split(",") if rate)
        if virtual and (engine != "emulated" or any(_given(context, name) for name in _NOT_VIRTUAL)):
            raise ValueError("--virtual is for presets: it takes no --engine vllm, --model, --repetitions, --saturate")
    except (ScenarioError, UnknownPresetError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    plan = Plan(scenario, wanted, window, seed, seconds, repetitions, Scale(divisor, tpot_factor, stage_tokens), traces)
    if virtual:
        _virtual(console, preset(preset_name), file, plan, 2 if async_scheduling else 1, results)
        return
    with TemporaryDirectory(prefix="slos-live-") as folder:
        settings = EngineSettings(
            engine=engine,
            model=str(write_shape(shape, Path(folder) / shape)) if shape else model,
            weights="dummy" if shape else "auto",
            preset=preset_name,
            data_dir=Path(folder),
            async_scheduling=async_scheduling or None,
            prefix_caching=file.scenario(scenario).prefix_caching,
        )
        try:
            if saturated:
                run_interruptible(saturate(console, settings, file, seed, results))
            else:
                run_interruptible(_live(console, settings, file, plan, results))
        except WorkloadError as error:
            raise typer.BadParameter(str(error)) from None


def _virtual(console: Console, chosen: Preset, file: ScenarioFile, plan: Plan, depth: int, results: Path) -> None:
    try:
        workload = build_workload(
            file, plan.scenario, chosen.model, index=plan.window, seed=plan.seed, traces=plan.traces
        )
        rates = plan.rates or tuple(workload.rate * factor for factor in _FACTORS)
        run_virtual(console, chosen, file, workload, rates, plan.seconds, plan.scale, depth, results)
    except WorkloadError as error:
        raise typer.BadParameter(str(error)) from None


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option was given rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


async def _live(console: Console, settings: EngineSettings, file: ScenarioFile, plan: Plan, results: Path) -> None:
    console.print(f"starting plain vLLM and the stack, engine {settings.engine}")
    async with sides(settings, file, settings.data_dir) as side:
        points, rates = await measure(console, side, settings, file, plan)
    name = side.measured.name
    stem = f"live-{settings.engine}-{name}-{plan.scenario}"
    text = table(points, f"{plan.scenario} on {name}")
    note = _note(settings, plan, side)
    result: dict[str, Any] = {
        "kind": "live",
        "settings": {
            "engine": settings.engine, "scenario": plan.scenario, "window": plan.window, "seed": plan.seed,
            "seconds": plan.seconds, "repetitions": plan.repetitions, "async_scheduling": settings.async_scheduling,
            "length_divisor": plan.scale.length_divisor, "tpot_factor": plan.scale.tpot_factor,
            "stage_tokens": plan.scale.stage_tokens,
        },
        "rates": rates,
        "r2_heldout": side.r2_heldout,
        "errors": side.services.errors,
        "points": [point_json(point) for point in points],
        **provenance(side.measured),
    }  # fmt: skip
    path = write_result(results, stem, result, f"{note}\n\n{text}")
    attainment_plot(points, f"{plan.scenario}, {name}, real time", path.with_suffix(".png"))
    console.print(text)
    for error in side.services.errors[:5]:
        console.print(error, style="red", markup=False)
    console.print(f"written: {path}, .md and .png")


async def measure(
    console: Console,
    side: Side,
    settings: EngineSettings,
    file: ScenarioFile,
    plan: Plan,
    on_point: Callable[[list[Measured]], object] = lambda _: None,
) -> tuple[list[Measured], list[float]]:
    """Every load, every repetition, both systems in turn; which goes first alternates.

    `on_point` is called with all points so far after each.
    """
    model = side.measured.model
    workload = build_workload(file, plan.scenario, model, index=plan.window, seed=plan.seed, traces=plan.traces)
    scale = replace(plan.scale, context_tokens=side.measured.max_model_len)
    rates = list(plan.rates) or [workload.rate * factor for factor in _FACTORS]
    maker = load_prompt_maker(Path(settings.model) / "tokenizer.json")
    points: list[Measured] = []
    await _warm_up(side, file, workload, scale, maker)
    with _progress(console) as progress:
        for number, (rate, repetition) in enumerate((r, n) for r in rates for n in range(plan.repetitions)):
            jobs = live_jobs(workload, file, model, scale, rate=rate, seconds=plan.seconds)
            if not jobs:
                raise WorkloadError(f"no job arrives within {plan.seconds:g} s at {rate:g}/s")
            both: Sequence[Target] = (side.bare, side.services)
            for target in both if number % 2 == 0 else both[::-1]:
                side.services.kept_by_service.clear()
                task = progress.add_task(f"{target.name} at {rate:.2f}/s", total=len(jobs), text="")
                done = await run_round(
                    target,
                    jobs,
                    Conversations(maker, plan.seed * 1000 + number),
                    f"{target.name}-{number}",
                    seconds=plan.seconds,
                    grace_s=_GRACE_S,
                    on_change=partial(_show, progress, task),
                )
                outcome = outcome_of(done.calls, len(jobs), promises=target.promises)
                kept = side.services.kept_by_service if target.promises else None
                told = None if kept is None else (sum(kept), len(kept))
                points.append(Measured(target.name, rate, repetition, outcome, done, told))
                on_point(points)
                if not console.is_terminal:  # where no progress bar is drawn
                    console.print(
                        f"{target.name} at {rate:.2f}/s: met {outcome.attainment:.3f}, kept {outcome.kept:.3f}"
                    )
    return points, rates


async def _warm_up(side: Side, file: ScenarioFile, workload: Workload, scale: Scale, maker: PromptMaker) -> None:
    """A few jobs to each, not counted: first calls connect, compile and fill caches."""
    jobs = live_jobs(workload, file, side.measured.model, scale, rate=workload.rate, seconds=3600.0)[:4]
    short = [job for job in jobs if sum(call.output_tokens for call in job.calls) < 1000] or jobs[:1]
    targets: Sequence[Target] = (side.bare, side.services)
    for target in targets:
        prompts = Conversations(maker, 0)
        await run_round(
            target, short, prompts, f"{target.name}-warm", seconds=10.0, grace_s=_GRACE_S, on_change=lambda _: None
        )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=console,
    )  # fmt: skip


def _show(progress: Progress, task: TaskID, seen: Seen) -> None:
    text = f"{seen.sent - seen.ended} running, {seen.promised} promised, {seen.tokens:,} tokens"
    progress.update(task, completed=seen.ended, text=text)


def _note(settings: EngineSettings, plan: Plan, side: Side) -> str:
    """What the numbers are about, in a sentence or two."""
    shape = side.measured
    if settings.engine == "emulated":
        what = f"Emulated {shape.name}: vLLM's engine, scheduler and KV manager, with the modelled time per batch."
    else:
        weights = " (random weights)" if settings.weights == "dummy" else ""
        what = (
            f"Real vLLM with {shape.name}{weights}, performance model fitted at start "
            f"(held-out R2 {side.r2_heldout:.3f}). "
            f"SLOs are scaled to it: TTFTs are slowdowns of its own zero-load prefill, lengths are divided by "
            f"{plan.scale.length_divisor:g}, TPOTs multiplied by {plan.scale.tpot_factor:g}. Engine, services and "
            f"load generator share {os.cpu_count()} cores."
        )
    counted = (
        f"Times as the client saw them; {plan.seconds:g} s of arrivals per round, {plan.repetitions} round(s) of each "
        f"system at each load, in turn. `other load` is CPU that processes outside the benchmark used meanwhile."
    )
    return f"{what}\n{counted} Outputs are cut at {plan.scale.stage_tokens} tokens per stage."
