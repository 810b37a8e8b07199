"""`python -m bench gpu`: everything that needs a GPU, in one run that leaves one JSON and one Markdown file.

A model of 8B shape with random weights (stated in the result) is profiled by the worker as at every start, the
performance model is fitted, and the mixed scenario runs in real time on plain vLLM and on the full stack in turn.
Without a GPU the same runs on the emulated engine, or with `--without cpu` on real CPU vLLM with the bundled model; the
file's name and its first line say so.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from bench.interruptible import run_interruptible
from bench.live import Plan, measure
from bench.live_jobs import Scale
from bench.live_report import Measured, point_json, table
from bench.live_stack import Side, sides
from bench.model_shape import SHAPES, write_shape
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, ScenarioFile, load_scenarios
from bench.workload import TRACES
from services.cli.stack_spec import BUNDLED_MODEL
from services.worker.engine_settings import EngineSettings
from services.worker.profile_store import processor_name

__all__ = ["Hardware", "found_hardware", "main"]

_EMULATED = "opt-6.7b-a100"
_HALF = 0.45  # of the GPU's memory for each of the two engines


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
    except (ScenarioError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    hardware = found_hardware(without)
    if hardware.gpu is None:
        console.print(f"[bold yellow]no GPU here[/]: running {hardware.stands_in} instead; no number below is a GPU's")
    divisor = 4.0 if hardware.stands_in.startswith("cpu") else 1.0
    plan = Plan(scenario, wanted, 0, seed, seconds, repetitions, Scale(divisor, stage_tokens=stage_tokens), TRACES)
    with TemporaryDirectory(prefix="slos-gpu-") as folder:
        settings = _settings(hardware, shape, profile_s, Path(folder))
        run_interruptible(_run(console, hardware, shape, settings, file, plan, results))


def _settings(hardware: Hardware, shape: str, profile_s: float, data_dir: Path) -> EngineSettings:
    common: dict[str, Any] = {"data_dir": data_dir, "profile_s": profile_s, "prefix_caching": True}
    if hardware.gpu is not None:
        model = str(write_shape(shape, data_dir / shape))
        return EngineSettings(engine="vllm", model=model, weights="dummy", gpu_memory_share=_HALF, **common)
    if hardware.stands_in.startswith("cpu"):
        return EngineSettings(engine="vllm", model=str(BUNDLED_MODEL), **common)
    return EngineSettings(
        engine="emulated", model=str(BUNDLED_MODEL), preset=_EMULATED, async_scheduling=True, **common
    )


async def _run(
    console: Console,
    hardware: Hardware,
    shape: str,
    settings: EngineSettings,
    file: ScenarioFile,
    plan: Plan,
    results: Path,
) -> None:
    async with sides(settings, file, settings.data_dir) as side:
        console.print(f"performance model fitted: held-out R2 {side.r2_heldout:.4f}")
        points, rates = await measure(console, side, settings, file, plan)
    text = _markdown(hardware, shape, settings, side, points, plan)
    result: dict[str, Any] = {
        "kind": "gpu",
        "hardware": asdict(hardware),
        "settings": {"shape": shape if hardware.gpu else "", "weights": settings.weights, "scenario": plan.scenario,
                     "seed": plan.seed, "seconds": plan.seconds, "repetitions": plan.repetitions,
                     "length_divisor": plan.scale.length_divisor, "stage_tokens": plan.scale.stage_tokens},
        "rates": rates,
        "r2_heldout": side.r2_heldout,
        "errors": side.services.errors,
        "points": [point_json(point) for point in points],
        **provenance(side.measured),
    }  # fmt: skip
    path = write_result(results, f"gpu-{hardware.label}", result, text)
    console.print(text)
    console.print(f"written: {path} and .md")


def _markdown(
    hardware: Hardware, shape: str, settings: EngineSettings, side: Side, points: list[Measured], plan: Plan
) -> str:
    if hardware.gpu is not None:
        first = f"{hardware.gpu}, {hardware.memory_gib:.0f} GiB; {shape}, weights: {settings.weights}."
    else:
        first = f"**No GPU**: this ran {hardware.stands_in}. It shows that the command works, and nothing about a GPU."
    segments = [
        [f"segment {number}", *(f"{value:.3g}" for value in row)] for number, row in enumerate(side.measured.model.rows)
    ]
    fit = "" if settings.engine == "emulated" else f", held-out R2 {side.r2_heldout:.4f}"
    model = markdown_table([f"performance model, seconds{fit}", "k_tok", "k_ctx", "k_req", "k_step", "b"], segments)
    return f"{first}\n\n{model}\n{table(points, f'{plan.scenario}, real time')}"
