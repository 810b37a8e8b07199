"""`python -m bench gpu`: everything that needs a GPU, in one run that leaves one JSON and one Markdown file.

A model of 8B shape with random weights (stated in the result) is profiled by the worker as at every start, the
performance model is fitted, and the mixed scenario runs in real time on plain vLLM and on the full stack in turn.
Without a GPU the same runs on the emulated engine, or with `--without cpu` on real CPU vLLM with the bundled model; the
file's name and its first line say so.

What has been measured is written after every round, so that a run which is cut short has not been for nothing.
"""

import asyncio
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from bench.interruptible import run_interruptible
from bench.live import Plan, measure
from bench.live_jobs import Scale
from bench.live_report import Measured, attainment_plot, point_json, table
from bench.live_saturate import LOADS, Saturated, saturated_rounds
from bench.live_stack import Side, measured_batches, sides
from bench.model_shape import SHAPES, write_shape
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, ScenarioFile, load_scenarios
from bench.workload import TRACES
from protos import worker_pb2
from services.cli.perf_fit import fit_view
from services.cli.perf_plot import save_picture
from services.cli.stack_spec import BUNDLED_MODEL
from services.worker.engine_settings import EngineSettings
from services.worker.extra_arguments import check_extra_arguments
from services.worker.profile_store import processor_name

__all__ = ["Hardware", "found_hardware", "main"]

_EMULATED = "opt-6.7b-a100"
_HALF = 0.45  # of the GPU's memory for each of the two engines
_SATURATED = (512, 256, 128)  # requests, prompt tokens, output tokens of each, on a GPU


@dataclass(frozen=True, slots=True)
class Hardware:
    """What it runs on. `gpu` is None where there is none: then `stands_in` names what was run instead."""

    gpu: str | None
    memory_gib: float
    driver: str
    torch: str
    stands_in: str

    @property
    def label(self) -> str:
        """For the file's name."""
        name = self.gpu.lower().replace(" ", "-") if self.gpu else f"none-{self.stands_in.split()[0]}"
        return "".join(letter for letter in name if letter.isalnum() or letter == "-")


def found_hardware(without: str) -> Hardware:
    """The first CUDA device, or what stands in for it."""
    import torch

    if not torch.cuda.is_available():
        stand_in = f"emulated {_EMULATED}" if without == "emulated" else f"cpu {processor_name()}"
        return Hardware(None, 0.0, "", torch.__version__, stand_in)
    properties = torch.cuda.get_device_properties(0)
    return Hardware(properties.name, properties.total_memory / 2**30, str(torch.version.cuda), torch.__version__, "")


def main(
    shape: Annotated[str, typer.Option(help=f"model shape on a GPU: {', '.join(SHAPES)}")] = "llama-3.1-8b",
    without: Annotated[Literal["emulated", "cpu"], typer.Option(help="what to run where there is no GPU")] = "emulated",
    scenario: Annotated[str, typer.Option(help="one scenario of the file")] = "mixed",
    rates: Annotated[str, typer.Option(help="jobs/s, comma-separated; empty: 0.1, 0.2, 0.3 of the trace's own")] = "",
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="how long jobs arrive in each round")] = 120.0,
    repetitions: Annotated[int, typer.Option(min=1)] = 1,
    stage_tokens: Annotated[int, typer.Option(min=1, help="longest output of a stage")] = 800,
    profile_s: Annotated[float, typer.Option(min=1, max=600, help="how long the engine is profiled")] = 30.0,
    engine_args: Annotated[str, typer.Option(help="vLLM's own engine arguments for both, a JSON object")] = "{}",
    saturated: Annotated[bool, typer.Option("--saturate/--no-saturate", help="measure throughput at the end")] = True,
    seed: Annotated[int, typer.Option()] = 1,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
) -> None:
    """Profile, fit, and serve the mixed scenario beside plain vLLM."""
    console = Console(highlight=False)
    if shape not in SHAPES:
        raise typer.BadParameter(f"no shape {shape!r}; there are: {', '.join(SHAPES)}", param_hint="--shape")
    try:
        file = load_scenarios(SCENARIOS)
        file.scenario(scenario)
        wanted = tuple(float(rate) for rate in rates.split(",") if rate)
        extra = _parsed(engine_args)
    except (ScenarioError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    hardware = found_hardware(without)
    if hardware.gpu is None:
        console.print(f"[bold yellow]no GPU here[/]: running {hardware.stands_in} instead; no number below is a GPU's")
    divisor = 4.0 if hardware.stands_in.startswith("cpu") else 1.0
    plan = Plan(scenario, wanted, 0, seed, seconds, repetitions, Scale(divisor, stage_tokens=stage_tokens), TRACES)
    with TemporaryDirectory(prefix="slos-gpu-") as folder:
        settings = _settings(hardware, shape, profile_s, Path(folder), extra)
        if settings.engine == "emulated" and extra:
            raise typer.BadParameter("the emulated engine has no use for vLLM's arguments", param_hint="--engine-args")
        run_interruptible(_run(console, Report(hardware, shape, settings, plan, results), file, saturated))


def _parsed(engine_args: str) -> dict[str, Any]:
    """The arguments of `--engine-args`; ValueError where they are no object or may not be given."""
    extra = json.loads(engine_args)
    if not isinstance(extra, dict):
        raise ValueError("--engine-args is a JSON object")
    check_extra_arguments(extra)
    return extra


def _settings(
    hardware: Hardware, shape: str, profile_s: float, data_dir: Path, extra: dict[str, Any]
) -> EngineSettings:
    common: dict[str, Any] = {"data_dir": data_dir, "profile_s": profile_s, "prefix_caching": True, "extra": extra}
    if hardware.gpu is not None:
        model = str(write_shape(shape, data_dir / shape))
        return EngineSettings(engine="vllm", model=model, weights="dummy", gpu_memory_share=_HALF, **common)
    if hardware.stands_in.startswith("cpu"):
        return EngineSettings(engine="vllm", model=str(BUNDLED_MODEL), **common)
    return EngineSettings(
        engine="emulated", model=str(BUNDLED_MODEL), preset=_EMULATED, async_scheduling=True, **common
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What is measured, and where it is written."""

    hardware: Hardware
    shape: str
    settings: EngineSettings
    plan: Plan
    results: Path

    @property
    def stem(self) -> str:
        """Of the files' names."""
        return f"gpu-{self.hardware.label}"

    def write(
        self,
        side: Side,
        profile: worker_pb2.ProfileResponse,
        points: list[Measured],
        saturated: Saturated | None = None,
    ) -> str:
        """One JSON file, one Markdown file, one plot; returns the Markdown."""
        settings, plan = self.settings, self.plan
        text = self._markdown(side, saturated, points)
        result: dict[str, Any] = {
            "kind": "gpu",
            "hardware": asdict(self.hardware),
            "settings": {
                "shape": self.shape if self.hardware.gpu else "", "weights": settings.weights,
                "scenario": plan.scenario, "seed": plan.seed, "seconds": plan.seconds,
                "repetitions": plan.repetitions, "length_divisor": plan.scale.length_divisor,
                "stage_tokens": plan.scale.stage_tokens, "engine_args": dict(settings.extra),
            },
            "rates": sorted({point.rate for point in points}),
            "r2_heldout": side.r2_heldout,
            "errors": side.services.errors,
            "batch_columns": ["tokens", "context_tokens", "requests", "draft_steps", "attended", "seconds", "heldout"],
            "batches": [
                [b.tokens, b.context_tokens, b.requests, b.draft_steps, b.attended, b.seconds, b.heldout]
                for b in profile.profiled
            ],
            "points": [point_json(point) for point in points],
            "saturated": saturated.as_json() if saturated else None,
            **provenance(side.measured),
        }  # fmt: skip
        path = write_result(self.results, self.stem, result, text)
        if points:
            attainment_plot(points, f"{plan.scenario}, {side.measured.name}, real time", path.with_suffix(".png"))
        return text

    def _markdown(self, side: Side, saturated: Saturated | None, points: list[Measured]) -> str:
        hardware, settings, plan = self.hardware, self.settings, self.plan
        if hardware.gpu is not None:
            memory = f"{hardware.gpu}, {hardware.memory_gib:.0f} GiB"
            first = (
                f"{memory}; {self.shape}, weights: {settings.weights}; {_HALF:.0%} of the memory for each system, "
                f"{side.measured.kv_blocks} KV blocks of {side.measured.block_size}."
            )
        else:
            first = (
                f"**No GPU**: this ran {hardware.stands_in}. It shows that the command works, and nothing about a GPU."
            )
        if settings.extra:
            first += f" vLLM's arguments, for both: `{json.dumps(dict(settings.extra))}`."
        model = side.measured.model
        segments = [[f"segment {number}", *(f"{value:.3g}" for value in row)] for number, row in enumerate(model.rows)]
        segments.append(["attention", f"{model.attention:.3g}", "", "", "", ""])
        fit = "" if settings.engine == "emulated" else f", held-out R2 {side.r2_heldout:.4f}"
        fitted = markdown_table(
            [f"performance model, seconds{fit}", "k_tok", "k_ctx", "k_req", "k_step", "b"], segments
        )
        parts = [first, fitted, table(points, f"{plan.scenario}, real time")]
        if saturated is not None:
            parts.append(saturated.markdown("best effort only"))
        return "\n\n".join(parts)


async def _run(console: Console, report: Report, file: ScenarioFile, saturated: bool) -> None:
    settings = report.settings
    async with sides(settings, file, settings.data_dir) as side:
        console.print(f"performance model fitted: held-out R2 {side.r2_heldout:.4f}")
        profile = await measured_batches(side.stack)
        if profile.profiled:
            report.results.mkdir(parents=True, exist_ok=True)
            save_picture(fit_view(profile), report.results / f"{report.stem}-fit.png")
        write = partial(report.write, side, profile)
        points, _ = await measure(console, side, settings, file, report.plan, write)
        rounds = None
        if saturated:
            load = _SATURATED if report.hardware.gpu else LOADS[settings.engine]
            await side.stack.kill("planner-0")
            await asyncio.sleep(settings.lapse_s)  # after the last promise
            rounds = await saturated_rounds(console, side, settings, file, report.plan.seed, *load)
        text = write(points, rounds)
    console.print(text)
    console.print(f"written: {report.results / report.stem}.json, .md and .png")
