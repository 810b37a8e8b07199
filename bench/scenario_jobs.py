"""From a scenario to the requests that are sent: arrivals, lengths, stages and TTFTs in seconds.

A job is what counts as met or missed: one request, or a whole session whose next call starts when the one before it
has ended and its gap has passed. Everything is deterministic in (scenario, window, seed).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

from bench.scenario import AppRule, ScenarioFile, ScenarioRule, StageRule
from bench.workload import (
    TRACES,
    StageRow,
    TraceRow,
    WorkloadError,
    load_lengths,
    load_sessions,
    load_trace,
    window,
    with_lengths,
)
from services.core.perf_model import PerfModel
from services.core.slo import StageKind, StageSlo, resolve_ttft_s

__all__ = ["Call", "Job", "Stage", "Workload", "at_rate", "build_workload"]


@dataclass(frozen=True, slots=True)
class Stage:
    """`tokens` of output at a TPOT of `tpot_s`."""

    kind: StageKind
    tpot_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Call:
    """One model call. `gap_s` passes between the end of the call before it and its own arrival.

    `cached_tokens` of the prompt are the session's history, which a prefix cache may hold; the TTFT is for the rest.
    """

    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    stages: tuple[Stage, ...]
    gap_s: float = 0.0

    @property
    def output_tokens(self) -> int:
        """Output over all stages."""
        return sum(stage.tokens for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Job:
    """A request or a session: its first arrival and its calls, in order."""

    number: int
    application: str
    arrival_s: float
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """The jobs of a scenario at the trace's own rate, `rate` jobs per second."""

    scenario: str
    window: int
    seed: int
    rule: ScenarioRule
    jobs: tuple[Job, ...]
    rate: float


def at_rate(workload: Workload, rate: float) -> tuple[Job, ...]:
    """The jobs at another rate, jobs/s: arrival times are divided, gaps and lengths stay."""
    factor = rate / workload.rate
    return tuple(replace(job, arrival_s=job.arrival_s / factor) for job in workload.jobs)


def build_workload(
    file: ScenarioFile, name: str, model: PerfModel, *, index: int = 0, seed: int = 1, traces: Path = TRACES
) -> Workload:
    """The jobs of scenario `name` in window `index`; slowdowns are resolved on `model`.

    The rate of a window is that of the jobs used. Raises ScenarioError or WorkloadError for what is not there.
    """
    rule = file.scenario(name)
    if not 0 <= index < len(rule.windows):
        raise WorkloadError(f"scenario {name} has {len(rule.windows)} windows, no window {index}")
    rows = window(load_trace(rule.arrivals, traces), *rule.windows[index])
    if rule.application is not None:
        rows = _own_lengths(rows, rule.application, file.applications[rule.application], seed, traces)
    rows = _replaced(rows[: rule.most_requests * 4], file, rule, seed, traces)
    longest = rule.longest_request_tokens or file.max_model_len
    rows = tuple(row for row in rows if row.prompt_tokens + row.output_tokens <= longest)[: rule.most_requests]
    if rule.poisson:
        rows = _poisson(rows, seed)
    if len(rows) < 2:
        raise WorkloadError(f"scenario {name}, window {index}: fewer than two requests")
    jobs = tuple(_Jobs(file, model, seed, traces).build(rows))
    return Workload(name, index, seed, rule, jobs, (len(jobs) - 1) / (rows[-1].arrival_s - rows[0].arrival_s))


def _own_lengths(
    rows: Sequence[TraceRow], application: str, app: AppRule, seed: int, traces: Path
) -> tuple[TraceRow, ...]:
    if app.lengths is None:
        return tuple(replace(row, application=application) for row in rows)
    return with_lengths(rows, load_lengths(app.lengths, traces), application, seed)


def _replaced(
    rows: Sequence[TraceRow], file: ScenarioFile, rule: ScenarioRule, seed: int, traces: Path
) -> tuple[TraceRow, ...]:
    if rule.replaced is None:
        return tuple(rows)
    random = Random(seed)
    by = rule.replaced.by
    chosen = {
        index: by[random.randrange(len(by))] for index in range(len(rows)) if random.random() < rule.replaced.share
    }
    result = list(rows)
    for number, application in enumerate(by):
        places = [index for index, name in chosen.items() if name == application]
        app = file.applications[application]
        new = _own_lengths([rows[index] for index in places], application, app, seed + number, traces)
        for index, row in zip(places, new, strict=True):
            result[index] = row
    return tuple(result)


def _poisson(rows: Sequence[TraceRow], seed: int) -> tuple[TraceRow, ...]:
    """The same rows in the same order, with exponential times between arrivals of the same mean."""
    random = Random(seed)
    rate = (len(rows) - 1) / (rows[-1].arrival_s - rows[0].arrival_s)
    arrivals_s = accumulate((random.expovariate(rate) for _ in rows[1:]), initial=0.0)
    return tuple(replace(row, arrival_s=arrival_s) for row, arrival_s in zip(rows, arrivals_s, strict=True))


class _Jobs:
    """Makes jobs out of rows."""

    def __init__(self, file: ScenarioFile, model: PerfModel, seed: int, traces: Path) -> None:
        self._file = file
        self._model = model
        self._seed = seed
        self._traces = traces
        self._sessions: dict[str, tuple[tuple[StageRow, ...], ...]] = {}
        self._gaps: dict[str, tuple[float, ...]] = {}

    def build(self, rows: Sequence[TraceRow]) -> Iterable[Job]:
        """One job per row, the first at time 0."""
        start_s = rows[0].arrival_s
        for number, row in enumerate(rows):
            if row.application not in self._file.applications:
                raise WorkloadError(f"the scenario file has no application {row.application!r}")
            app = self._file.applications[row.application]
            calls = (self._call(app, app.stages, row),) if app.sessions is None else self._session(app, number)
            yield Job(number, row.application, row.arrival_s - start_s, calls)

    def _call(
        self, app: AppRule, stages: Sequence[StageRule], row: TraceRow, cached_tokens: int = 0, gap_s: float = 0.0
    ) -> Call:
        prompt = max(1, row.prompt_tokens)
        slo = StageSlo(StageKind.ANSWER, None, app.ttft_slowdown, 1.0, 1)
        uncached = max(1, prompt - cached_tokens)
        ttft_s = resolve_ttft_s(slo, uncached, self._model, self._file.ttft_floor_ms / 1000)
        assert ttft_s is not None
        return Call(prompt, prompt - uncached, ttft_s, _stages(stages, row), gap_s)

    def _session(self, app: AppRule, number: int) -> tuple[Call, ...]:
        assert app.sessions is not None
        if app.sessions not in self._sessions:
            found = list(load_sessions(app.sessions, self._traces))
            Random(self._seed).shuffle(found)
            self._sessions[app.sessions] = tuple(found)
        sessions = self._sessions[app.sessions]
        gaps = self._gaps_of(app.gaps)
        random = Random(self._seed * 1_000_003 + number)
        history = 0
        calls = []
        rows = sessions[number % len(sessions)]
        for index, stage in enumerate(rows):
            last = index == len(rows) - 1
            row = TraceRow(0.0, max(stage.prompt_tokens, history + 1), stage.output_tokens, "")
            gap_s = random.choice(gaps) if index and gaps else 0.0
            call = self._call(app, app.last_stages if last and app.last_stages else app.stages, row, history, gap_s)
            calls.append(call)
            history = call.prompt_tokens + call.output_tokens
        return tuple(calls)

    def _gaps_of(self, name: str | None) -> tuple[float, ...]:
        """Recorded pauses between two calls of a session, seconds."""
        if name is None:
            return ()
        if name not in self._gaps:
            self._gaps[name] = tuple(
                max(0.0, after.start_s - before.start_s)
                for session in load_sessions(name, self._traces)
                for before, after in pairwise(session)
                if before.start_s is not None and after.start_s is not None
            )
        return self._gaps[name]


def _stages(rules: Sequence[StageRule], row: TraceRow) -> tuple[Stage, ...]:
    """A row's output over the stages; stages without a token are left out, and there is always one token."""
    thinking = min(row.thinking_tokens, row.output_tokens)
    has_thinking = any(rule.tokens == "thinking" for rule in rules)
    parts = {"thinking": thinking, "rest": row.output_tokens - thinking if has_thinking else row.output_tokens}
    stages = []
    for rule in rules:
        tokens = min(parts[rule.tokens], rule.max_tokens or parts[rule.tokens])
        if tokens > 0:
            stages.append(Stage(rule.kind, rule.tpot_ms / 1000, tokens))
    return tuple(stages) or (Stage(rules[-1].kind, rules[-1].tpot_ms / 1000, 1),)
