"""`python -m bench bound`: the hindsight bound of every scenario, beside which capacities are read."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.bound_program import BoundShape, served_share
from bench.capacity_search import TARGET
from bench.report_files import RESULTS, markdown_table, provenance, write_result
from bench.scenario import SCENARIOS, ScenarioError, load_scenarios
from bench.scenario_jobs import Workload, at_rate, build_workload
from bench.workload import TRACES, WorkloadError
from services.core.presets import Preset, UnknownPresetError, preset

__all__ = ["BoundRow", "find_bound", "main"]

_CLOSE = 0.002
_MOST_SOLVES = 12
_STEP = 1.5


@dataclass(frozen=True, slots=True)
class BoundRow:
    """The load at which the program serves 0.90 of the jobs, jobs/s, and the points it was found by."""

    scenario: str
    window: int
    seed: int
    bound: float
    points: tuple[tuple[float, float], ...]


def find_bound(share: Callable[[float], float], guess: float) -> tuple[float, tuple[tuple[float, float], ...]]:
    """The rate at which the falling function `share` crosses 0.90, by bracketing and false position, and its points."""
    points = [(guess, share(guess))]
    while (points[-1][1] >= TARGET) == (points[0][1] >= TARGET) and len(points) < _MOST_SOLVES:
        rate = points[-1][0] * (_STEP if points[0][1] >= TARGET else 1 / _STEP)
        points.append((rate, share(rate)))
    while len(points) < _MOST_SOLVES and min(abs(value - TARGET) for _, value in points) > _CLOSE:
        low = max((point for point in points if point[1] >= TARGET), default=None)
        high = min((point for point in points if point[1] < TARGET), default=None)
        if low is None or high is None:
            break
        rate = low[0] + (high[0] - low[0]) * (low[1] - TARGET) / (low[1] - high[1])
        points.append((rate, share(rate)))
    return min(points, key=lambda point: abs(point[1] - TARGET))[0], tuple(sorted(points))


def main(
    preset_name: Annotated[str, typer.Option("--preset", help="modelled hardware and model")] = "opt-6.7b-a100",
    scenario: Annotated[str, typer.Option(help="names, comma-separated")] = "chatbot,coder,summarizer,chat-code,mixed",
    windows: Annotated[str, typer.Option(help="indices of the windows, comma-separated")] = "0,1,2",
    seed: Annotated[int, typer.Option()] = 1,
    kv_blocks: Annotated[int, typer.Option(help="0: the preset's; -1: unlimited")] = 0,
    interval: Annotated[float, typer.Option(min=0.02, help="seconds per interval of the program")] = 0.25,
    scenarios: Annotated[Path, typer.Option(help="scenario file")] = SCENARIOS,
    traces: Annotated[Path, typer.Option(help="directory of traces")] = TRACES,
    results: Annotated[Path, typer.Option(help="where results are written")] = RESULTS,
) -> None:
    """Solve the program at a few loads and find where it serves 0.90 of the jobs."""
    console = Console()
    rows: list[BoundRow] = []
    try:
        file, chosen = load_scenarios(scenarios), preset(preset_name)
        for name in scenario.split(","):
            for index in map(int, windows.split(",")):
                workload = build_workload(file, name, chosen.model, index=index, seed=seed, traces=traces)
                rows.append(_bound(workload, chosen, kv_blocks, interval))
                console.print(f"{name} w{index}: {rows[-1].bound:.2f}/s  {len(rows[-1].points)} solves")
    except (ScenarioError, WorkloadError, UnknownPresetError) as error:
        raise typer.BadParameter(str(error)) from None
    blocks = "inf" if kv_blocks < 0 else kv_blocks or chosen.kv_blocks
    text = markdown_table(
        ["hindsight bound, jobs/s", "window", "bound"], [[r.scenario, str(r.window), f"{r.bound:.2f}"] for r in rows]
    )
    settings = {"kv_blocks": blocks, "interval_s": interval}
    result = {"kind": "bound", "settings": settings, "rows": [asdict(row) for row in rows], **provenance(chosen)}
    path = write_result(results, f"bound-{preset_name}-kv{blocks}", result, text)
    console.print(text)
    console.print(f"written: {path} and .md")


def _bound(workload: Workload, chosen: Preset, kv_blocks: int, interval_s: float) -> BoundRow:
    blocks = float("inf") if kv_blocks < 0 else float(kv_blocks or chosen.kv_blocks)
    shape = BoundShape(interval_s) if kv_blocks >= 0 else BoundShape(interval_s, paces=(1.0,))

    def share(rate: float) -> float:
        return served_share(at_rate(workload, rate), chosen.model, blocks * chosen.block_size, shape)

    bound, points = find_bound(share, workload.rate)
    return BoundRow(workload.scenario, workload.window, workload.seed, bound, points)
