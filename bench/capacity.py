"""`python -m bench capacity`: the highest load with attainment >= 0.90, per scenario, window and system."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from bench.capacity_search import Capacity, Laboratory, Metric, find_capacity
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, load_scenarios
from bench.scenario_jobs import Workload, build_workload
from bench.simulator_engine import Engines
from bench.systems import System, UnknownSystemError, families, parse_systems
from bench.workload import TRACES, WorkloadError
from services.core.presets import UnknownPresetError, preset

__all__ = ["METRICS", "SIX", "Row", "main", "summary"]

SIX: Final = ("chatbot", "coder", "summarizer", "tool-agent", "reasoner", "mixed")
METRICS: Final[dict[str, Metric]] = {
    "met": lambda outcome: outcome.attainment,
    "held": lambda outcome: outcome.held,
    "smooth": lambda outcome: outcome.smooth,
    "paper": lambda outcome: outcome.paper,
}
_UNLIMITED_BLOCKS = 65536


@dataclass(frozen=True, slots=True)
class Row:
    """Capacity of one system in one window."""

    scenario: str
    window: int
    seed: int
    system: str
    family: str
    capacity: Capacity

    def as_json(self) -> dict[str, Any]:
        """What a result file says of it."""
        at = self.capacity.at
        return {
            "scenario": self.scenario,
            "window": self.window,
            "seed": self.seed,
            "system": self.system,
            "family": self.family,
            "capacity": self.capacity.rate,
            "at_capacity": None if at is None else asdict(at.outcome),
            "points": [
                {"rate": p.rate, "attainment": p.outcome.attainment, "cut": p.cut, "steps": p.steps}
                for p in self.capacity.points
            ],
        }


def main(
    preset_name: Annotated[str, typer.Option("--preset", help="modelled hardware and model")] = "opt-6.7b-a100",
    scenario: Annotated[str, typer.Option(help="names, comma-separated; `all` for the six")] = "all",
    systems: Annotated[str, typer.Option(help="see bench/systems.py")] = "vllm,sarathi,slos-mh",
    windows: Annotated[str, typer.Option(help="indices of the windows, comma-separated")] = "0,1,2",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "1",
    metric: Annotated[str, typer.Option(help=", ".join(METRICS))] = "met",
    kv_blocks: Annotated[int, typer.Option(help="0: the preset's; -1: unlimited")] = 0,
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    depth: Annotated[int, typer.Option(min=1, max=2, help="batches in flight")] = 1,
    scenarios: Annotated[Path, typer.Option(help="scenario file")] = SCENARIOS,
    traces: Annotated[Path, typer.Option(help="directory of traces")] = TRACES,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
    label: Annotated[str, typer.Option(help="name of the result files; default: what was run")] = "",
) -> None:
    """Find capacities by bisection in virtual time around vLLM's real scheduler."""
    console = Console()
    try:
        file, chosen, members = load_scenarios(scenarios), preset(preset_name), parse_systems(systems)
        judge = METRICS[metric]
        blocks = {0: chosen.kv_blocks, -1: _UNLIMITED_BLOCKS}.get(kv_blocks, kv_blocks)
        laboratory = Laboratory(Engines(), chosen, file.tier_list(), blocks, replicas, depth)
        names = SIX if scenario == "all" else tuple(scenario.split(","))
        workloads = (
            build_workload(file, name, chosen.model, index=index, seed=seed, traces=traces)
            for name, index, seed in product(names, _numbers(windows), _numbers(seeds))
        )
        rows = [row for workload in workloads for row in _measure(laboratory, members, workload, judge, console)]
    except (ScenarioError, WorkloadError, UnknownSystemError, UnknownPresetError) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyError:
        raise typer.BadParameter(f"no metric {metric!r}; there are: {', '.join(METRICS)}") from None
    text = summary(rows, families(members))
    console.print(text)
    kv = "inf" if kv_blocks < 0 else blocks
    settings = {"metric": metric, "kv_blocks": kv, "replicas": replicas, "depth": depth, "precision": 0.03}
    result = {"kind": "capacity", "settings": settings, "rows": [row.as_json() for row in rows]}
    stem = label or f"capacity-{preset_name}-kv{kv}-{metric}"
    path = write_result(results, stem, {**result, **provenance(chosen)}, text)
    console.print(f"written: {path} and .md")


def _measure(
    laboratory: Laboratory, members: Sequence[System], workload: Workload, judge: Metric, console: Console
) -> Iterable[Row]:
    guess: float | None = None
    for system in members:
        capacity = find_capacity(laboratory, system, workload, judge, guess)
        guess = capacity.rate or guess
        row = Row(workload.scenario, workload.window, workload.seed, system.name, system.family, capacity)
        at = capacity.at
        detail = "" if at is None else " ".join(f"{a} {v:.2f}" for a, v in at.outcome.applications.items())
        kept = f"kept {at.outcome.kept:.3f} " if at is not None and system.promises else ""
        wall_s = sum(point.wall_s for point in capacity.points)
        console.print(
            f"{row.scenario} w{row.window} {row.system}: {capacity.rate:.2f}/s  {kept}{detail}  "
            f"[{len(capacity.points)} points, {wall_s:.0f} s]",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        yield row


def summary(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Mean capacity over windows and seeds by scenario and family, the best member counting in every window."""
    lines, ratios = [], []
    for scenario in dict.fromkeys(row.scenario for row in rows):
        means = [_mean_of_best([row for row in rows if row.scenario == scenario and row.family == f]) for f in names]
        cells = [f"{mean:.2f}" for mean in means]
        if len(names) > 1:
            ratio = means[-1] / means[0] if means[0] else math.inf
            ratios.append(ratio)
            cells.append(f"{ratio:.2f}")
        lines.append([scenario, *cells])
    header = ["capacity, jobs/s", *names, *([f"{names[-1]} / {names[0]}"] if len(names) > 1 else [])]
    if len(ratios) > 1 and all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(["geometric mean", *("" for _ in names), f"{mean:.2f}"])
    return markdown_table(header, lines)


def _mean_of_best(rows: Sequence[Row]) -> float:
    best: dict[tuple[int, int], float] = {}
    for row in rows:
        place = (row.window, row.seed)
        best[place] = max(best.get(place, 0.0), row.capacity.rate)
    return sum(best.values()) / len(best) if best else 0.0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers") from None
