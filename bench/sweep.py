"""`python -m bench sweep`: attainment over load, as a table and a plot."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.capacity import METRICS
from bench.capacity_search import TARGET, Laboratory, Point
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, load_scenarios
from bench.scenario_jobs import Workload, build_workload
from bench.simulator_engine import Engines
from bench.systems import System, UnknownSystemError, parse_systems
from bench.workload import TRACES, WorkloadError
from services.core.presets import UnknownPresetError, preset

__all__ = ["main", "plot"]

Curve = tuple[System, list[Point]]


def main(
    preset_name: Annotated[str, typer.Option("--preset", help="modelled hardware and model")] = "opt-6.7b-a100",
    scenario: Annotated[str, typer.Option(help="one scenario")] = "chatbot",
    systems: Annotated[str, typer.Option(help="see bench/systems.py")] = "vllm-2048,sarathi,slos-mh",
    rates: Annotated[str, typer.Option(help="jobs/s, comma-separated; empty: 0.4 to 2 times the trace's own")] = "",
    window: Annotated[int, typer.Option(help="index of the window")] = 0,
    seed: Annotated[int, typer.Option()] = 1,
    metric: Annotated[str, typer.Option(help=", ".join(METRICS))] = "met",
    kv_blocks: Annotated[int, typer.Option(help="0: the preset's")] = 0,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    depth: Annotated[int, typer.Option(min=1, max=2, help="batches in flight")] = 1,
    scenarios: Annotated[Path, typer.Option(help="scenario file")] = SCENARIOS,
    traces: Annotated[Path, typer.Option(help="directory of traces")] = TRACES,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
) -> None:
    """Run every system at every load, whole runs, and plot the metric."""
    console = Console()
    if metric not in METRICS:
        raise typer.BadParameter(f"no metric {metric!r}; there are: {', '.join(METRICS)}")
    try:
        file, chosen, members = load_scenarios(scenarios), preset(preset_name), parse_systems(systems)
        workload = build_workload(file, scenario, chosen.model, index=window, seed=seed, traces=traces)
        loads = _loads(rates, workload)
    except (ScenarioError, WorkloadError, UnknownSystemError, UnknownPresetError) as error:
        raise typer.BadParameter(str(error)) from None
    laboratory = Laboratory(Engines(), chosen, file.tier_list(), kv_blocks or chosen.kv_blocks, replicas, depth)
    curves: list[Curve] = []
    for system in members:
        points = []
        for rate in loads:
            point = laboratory.run(system, workload, rate, whole=True)
            points.append(point)
            console.print(f"{system.name} at {rate:.2f}/s: {METRICS[metric](point.outcome):.3f} [{point.wall_s:.0f} s]")
        curves.append((system, points))
    stem = f"sweep-{preset_name}-{scenario}-{metric}"
    text = _table(curves, loads, metric)
    result = {
        "kind": "sweep",
        "settings": {"scenario": scenario, "window": window, "seed": seed, "metric": metric, "replicas": replicas,
                     "depth": depth, "kv_blocks": laboratory.kv_blocks},
        "curves": [{"system": s.name, "points": [_point(p) for p in points]} for s, points in curves],
        **provenance(chosen),
    }  # fmt: skip
    path = write_result(results, stem, result, text)
    plot(curves, metric, f"{scenario}, {preset_name}", path.with_suffix(".png"))
    console.print(text)
    console.print(f"written: {path}, .md and .png")


def plot(curves: Sequence[Curve], metric: str, title: str, path: Path) -> None:
    """Attainment over load, one line per system, and the line that capacity is read at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for system, points in curves:
        loads = [point.rate for point in points]
        axes.plot(loads, [METRICS[metric](point.outcome) for point in points], marker="o", label=system.name)
    axes.axhline(TARGET, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="load, jobs/s", ylabel=f"attainment ({metric})", title=title, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _loads(rates: str, workload: Workload) -> list[float]:
    if not rates:
        return [workload.rate * factor for factor in (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0)]
    try:
        loads = sorted(float(rate) for rate in rates.split(","))
    except ValueError:
        raise WorkloadError(f"{rates!r} is not a list of rates") from None
    if loads[0] <= 0:
        raise WorkloadError("rates must be positive")
    return loads


def _point(point: Point) -> dict[str, object]:
    return {"rate": point.rate, "cut": point.cut, "steps": point.steps, "outcome": asdict(point.outcome)}


def _table(curves: Sequence[Curve], loads: Sequence[float], metric: str) -> str:
    header = [f"{metric} at jobs/s", *(f"{rate:.2f}" for rate in loads)]
    return markdown_table(
        header, [[s.name, *(f"{METRICS[metric](p.outcome):.3f}" for p in points)] for s, points in curves]
    )
