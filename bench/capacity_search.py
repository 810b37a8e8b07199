"""The highest load a system carries: bisection over the rate, each point one simulated run."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.metrics import Outcome, outcome_of
from bench.scenario_jobs import Job, Workload, at_rate
from bench.simulator import Clock, Simulation
from bench.simulator_engine import Engines
from bench.systems import System, build_front
from services.core.presets import Preset
from services.core.slo import Tier

__all__ = ["TARGET", "Capacity", "Laboratory", "Metric", "Point", "find_capacity"]

TARGET = 0.90
_PRECISION = 1.03
_STEP = 1.25
_LOWEST = 0.02

Metric = Callable[[Outcome], float]


@dataclass(frozen=True, slots=True)
class Point:
    """One run at one load. `cut` says why it ended early; its outcome then is of what had happened by then."""

    rate: float
    outcome: Outcome
    cut: str
    steps: int
    wall_s: float

    def carried(self, metric: Metric) -> bool:
        """Whether the system carried this load."""
        return not self.cut and metric(self.outcome) >= TARGET


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate carried, and every point on the way there."""

    rate: float
    points: tuple[Point, ...]

    @property
    def at(self) -> Point | None:
        """The run at capacity."""
        return next((point for point in self.points if point.rate == self.rate), None)


@dataclass(frozen=True, slots=True)
class Laboratory:
    """Everything about runs that does not change between them."""

    engines: Engines
    preset: Preset
    tiers: tuple[Tier, ...]
    kv_blocks: int
    replicas: int = 1
    depth: int = 1

    def run(self, system: System, workload: Workload, rate: float, *, whole: bool = False) -> Point:
        """One run of a system at a load. Unless `whole`, it ends as soon as the load is surely not carried."""
        return self.run_jobs(system, workload, at_rate(workload, rate), rate, whole=whole)

    def run_jobs(
        self, system: System, workload: Workload, jobs: Sequence[Job], rate: float, *, whole: bool = False
    ) -> Point:
        """As `run`, with jobs of a workload that were chosen by the caller."""
        started_s = time.perf_counter()
        clock = Clock()
        front = build_front(
            system, self.engines, self.preset, self.tiers, workload, clock,
            kv_blocks=self.kv_blocks, replicas=self.replicas, depth=self.depth,
        )  # fmt: skip
        most = None if whole else math.floor(len(jobs) * (1 - TARGET) + 1e-9)
        run = Simulation(clock, front, jobs, most).run()
        holds = "hold" in system.options
        outcome = outcome_of(run.calls, run.jobs, promises=system.promises, holds=holds)
        return Point(rate, outcome, run.cut, run.steps, time.perf_counter() - started_s)


def find_capacity(
    laboratory: Laboratory,
    system: System,
    workload: Workload,
    metric: Metric,
    guess: float | None = None,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Capacity:
    """The highest load carried, to 3 %. `guess` is where to look first.

    Where attainment is flat or not monotone in the load this is the upper end of one crossing, not the only one.
    """
    points: list[Point] = []

    def carried(rate: float) -> bool:
        point = laboratory.run(system, workload, rate)
        points.append(point)
        on_point(point)
        return point.carried(metric)

    low = guess or workload.rate
    high = low
    if carried(low):
        while carried(high := low * _STEP):
            low = high
    else:
        while not carried(low := high / _STEP):
            high = low
            if low < _LOWEST:
                return Capacity(0.0, tuple(points))
    while high / low > _PRECISION:
        middle = math.sqrt(low * high)
        if carried(middle):
            low = middle
        else:
            high = middle
    return Capacity(low, tuple(points))
