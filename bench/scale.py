"""`python -m bench scale`: capacity over the number of replicas, and what placing a request costs as a fleet grows.

A fleet of n replicas gets n times as many requests, out of a window n times as long that begins where the reference's
does, so that at n times its rate the run lasts as long. With the same requests for all, a large fleet would hold most
of them at once, and look better than it is.
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.capacity import METRICS
from bench.capacity_search import Laboratory, find_capacity
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, ScenarioFile, load_scenarios
from bench.scenario_jobs import build_workload
from bench.simulator_engine import Engines
from bench.systems import UnknownSystemError, parse_systems
from bench.workload import TRACES, WorkloadError
from services.core.placement import PlacementRequest, ReplicaLoad, order_replicas
from services.core.presets import UnknownPresetError, preset

__all__ = ["main", "order_cost_s", "ratio_interval", "widened"]

_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t, two-sided 95 %, by degrees of freedom from 1."""


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % confidence interval; the width of a single value is not known (NaN)."""
    if len(ratios) < 2:
        return ratios[0], math.nan
    t = _STUDENT_95[min(len(ratios) - 2, len(_STUDENT_95) - 1)]
    return statistics.mean(ratios), t * statistics.stdev(ratios) / math.sqrt(len(ratios))


def widened(file: ScenarioFile, scenario: str, count: int) -> ScenarioFile:
    """The scenarios with `count` times as many requests in `scenario`, out of windows `count` times as long."""
    rule = file.scenario(scenario)
    windows = tuple((start, start + (end - start) * count) for start, end in rule.windows)
    wide = rule.model_copy(update={"windows": windows, "most_requests": rule.most_requests * count})
    return file.model_copy(update={"scenarios": {**file.scenarios, scenario: wide}})


def order_cost_s(replicas: int, repeats: int = 50) -> float:
    """Median time to order a fleet of so many replicas for one request, seconds."""
    loads = [
        ReplicaLoad(f"r{n}", (n * 37) % 256, 256, (n * 997) % 7000, 7000, 16, ((n * 13) % 40) / 100, prefill_s=0.1)
        for n in range(replicas)
    ]
    wanted = PlacementRequest(1000, 200, 0.5)
    taken = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        order_replicas(wanted, loads)
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken)


def main(
    preset_name: Annotated[str, typer.Option("--preset", help="modelled hardware and model")] = "opt-6.7b-a100",
    scenario: Annotated[str, typer.Option(help="one scenario")] = "chatbot",
    system: Annotated[str, typer.Option(help="one system of bench/systems.py")] = "slos-mh",
    replicas: Annotated[str, typer.Option(help="fleet sizes, comma-separated; the first is the reference")] = "1,2,4",
    windows: Annotated[str, typer.Option(help="indices of the windows")] = "0,1,2",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "1",
    kv_blocks: Annotated[int, typer.Option(help="0: the preset's")] = 0,
    scenarios: Annotated[Path, typer.Option(help="scenario file")] = SCENARIOS,
    traces: Annotated[Path, typer.Option(help="directory of traces")] = TRACES,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
) -> None:
    """Find the capacity of every fleet size, window by window, and how it grows."""
    console = Console()
    rows: list[dict[str, Any]] = []
    try:
        file, chosen, members = load_scenarios(scenarios), preset(preset_name), parse_systems(system)
        sizes = [int(text) for text in replicas.split(",")]
        for window in (int(text) for text in windows.split(",")):
            for seed in (int(text) for text in seeds.split(",")):
                guess: float | None = None
                for count in sizes:
                    wide = widened(file, scenario, count)
                    workload = build_workload(wide, scenario, chosen.model, index=window, seed=seed, traces=traces)
                    blocks = kv_blocks or chosen.kv_blocks
                    laboratory = Laboratory(Engines(), chosen, file.tier_list(), blocks, count)
                    scaled = None if guess is None else guess * count
                    found = find_capacity(laboratory, members[0], workload, METRICS["met"], scaled)
                    guess = found.rate / count or guess
                    row = {"window": window, "seed": seed, "replicas": count, "jobs": len(workload.jobs)}
                    rows.append(row | {"capacity": found.rate})
                    console.print(f"{scenario} w{window} seed {seed}: {count} replicas {found.rate:.2f}/s")
    except (ScenarioError, WorkloadError, UnknownSystemError, UnknownPresetError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    costs = {count: order_cost_s(count) for count in (1, 8, 64, 256, 1000)}
    text = _tables(rows, sizes, costs)
    settings = {"scenario": scenario, "system": system, "kv_blocks": kv_blocks or chosen.kv_blocks}
    order_us = {str(count): cost * 1e6 for count, cost in costs.items()}
    result = {"kind": "scale", "settings": settings, "rows": rows, "order_us": order_us, **provenance(chosen)}
    path = write_result(results, f"scale-{preset_name}-{scenario}", result, text)
    console.print(text)
    console.print(f"written: {path} and .md")


def _tables(rows: Sequence[dict[str, Any]], sizes: Sequence[int], costs: dict[int, float]) -> str:
    places = sorted({(row["window"], row["seed"]) for row in rows})
    found = {(row["window"], row["seed"], row["replicas"]): row["capacity"] for row in rows}
    lines = []
    for count in sizes:
        ratios = [found[(*place, count)] / found[(*place, sizes[0])] for place in places if found[(*place, sizes[0])]]
        mean, half = ratio_interval(ratios) if ratios else (math.nan, math.nan)
        capacity = statistics.mean(found[(*place, count)] for place in places)
        lines.append([str(count), f"{capacity:.2f}", f"{mean:.2f}", f"{half:.2f}"])
    growth = markdown_table(["replicas", "capacity, jobs/s", f"times that of {sizes[0]}", "95 % +-"], lines)
    cost = markdown_table(
        ["replicas in the fleet", "ordering them for a request, us"],
        [[str(count), f"{cost_s * 1e6:.0f}"] for count, cost_s in costs.items()],
    )
    return f"{growth}\n{cost}"
