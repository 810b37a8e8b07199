"""`python -m bench capacity`: the highest load with attainment >= 0.90, per scenario, window and system."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from bench.capacity_book import ResultBook
from bench.capacity_search import Capacity, Laboratory, Metric, find_capacity
from bench.report_files import RESULTS
from bench.scenario import SCENARIOS, ScenarioError, load_scenarios
from bench.scenario_jobs import Workload, build_workload
from bench.simulator_engine import Engines
from bench.systems import System, UnknownSystemError, parse_systems
from bench.workload import TRACES, WorkloadError
from services.core.presets import UnknownPresetError, preset

__all__ = ["METRICS", "SIX", "Row", "main"]

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
    guess: Annotated[float, typer.Option(min=0, help="jobs/s to look at first; 0: the rate of the trace")] = 0.0,
    scenarios: Annotated[Path, typer.Option(help="scenario file")] = SCENARIOS,
    traces: Annotated[Path, typer.Option(help="directory of traces")] = TRACES,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
    label: Annotated[str, typer.Option(help="name of the result files; default: the settings")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="forget what the result files hold already")] = False,
) -> None:
    """Find capacities by bisection in virtual time around vLLM's real scheduler.

    Results are written after every capacity. Rows that the files hold for the same settings are kept unless they are
    measured again, so that a long comparison can be made in parts.
    """
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
        kv = "inf" if kv_blocks < 0 else blocks
        settings = {"metric": metric, "kv_blocks": kv, "replicas": replicas, "depth": depth, "precision": 0.03}
        book = ResultBook(results, label or f"capacity-{preset_name}-kv{kv}-{metric}", settings, chosen, fresh=fresh)
        for workload in workloads:
            for row in _measure(laboratory, members, workload, judge, console, guess or None):
                book.add(row.as_json())
    except (ScenarioError, WorkloadError, UnknownSystemError, UnknownPresetError) as error:
        raise typer.BadParameter(str(error)) from None
    except KeyError:
        raise typer.BadParameter(f"no metric {metric!r}; there are: {', '.join(METRICS)}") from None
    console.print(book.text)
    console.print(f"written: {book.path} and .md")


def _measure(
    laboratory: Laboratory,
    members: Sequence[System],
    workload: Workload,
    judge: Metric,
    console: Console,
    guess: float | None,
) -> Iterable[Row]:
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


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers") from None
