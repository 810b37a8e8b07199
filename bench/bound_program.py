"""The hindsight bound: a linear program that knows every arrival and every length.

Time is cut into intervals. Interval t has B_t batches, a real number, and

    b * B_t + k_tok * tokens_t + k_ctx * context_t + k_req * requests_t <= its length      (every segment of the model)

which holds for any schedule whose batches lie inside the interval. A request may be served in fractions. A served one

- is prefilled in the intervals between its arrival and its first token,
- gives its first token at one of a few times up to its deadline,
- decodes without pause at a constant share of its TPOT, which takes as many batches as tokens, and
- holds its KV from the first token to the last.

It is a bound on what any schedule of that shape can reach, and optimistic about everything fluid: batches need not be
whole, prefill holds no KV, and memory has no blocks. A schedule that pauses decoders is not covered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from bench.scenario_jobs import Call, Job
from bench.workload import WorkloadError
from services.core.perf_model import PerfModel

__all__ = ["BoundShape", "served_share"]


@dataclass(frozen=True, slots=True)
class BoundShape:
    """How fine the program is. `coarse` intervals share one row of batches per request and one of memory.

    paces: decode periods offered, as shares of the TPOT. starts: first tokens offered, as shares of the time between
    the earliest possible and the deadline.
    """

    interval_s: float = 0.25
    coarse: int = 4
    paces: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35, 0.25)
    starts: tuple[float, ...] = (0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Option:
    """One way to serve a request: its first token at `start_s`, then stages of `tokens` at `period_s` each."""

    request: int
    start_s: float
    stages: tuple[tuple[int, float], ...]

    @property
    def end_s(self) -> float:
        return self.start_s + sum(tokens * period_s for tokens, period_s in self.stages)


def served_share(jobs: Sequence[Job], model: PerfModel, kv_tokens: float, shape: BoundShape | None = None) -> float:
    """Largest share of the jobs that the program can serve. Raises WorkloadError for sessions: their calls depend on
    when the ones before them end."""
    if any(len(job.calls) > 1 for job in jobs):
        raise WorkloadError("the bound knows no sessions: a later call's arrival depends on the schedule")
    return _Program(jobs, model, kv_tokens, shape or BoundShape()).solve()


class _Rows:
    """Rows `coefficients @ x <= limit` in the making."""

    def __init__(self) -> None:
        self.row: list[int] = []
        self.column: list[int] = []
        self.value: list[float] = []
        self.limit: list[float] = []

    def new(self, limit: float) -> int:
        self.limit.append(limit)
        return len(self.limit) - 1

    def put(self, row: int, column: int, value: float) -> None:
        self.row.append(row)
        self.column.append(column)
        self.value.append(value)


class _Program:
    """Columns: batches per interval, then options, then prefill tokens per request and interval."""

    def __init__(self, jobs: Sequence[Job], model: PerfModel, kv_tokens: float, shape: BoundShape) -> None:
        self.jobs, self.model, self.shape = jobs, model, shape
        self.kv_tokens = min(kv_tokens, sum(j.calls[0].prompt_tokens + j.calls[0].output_tokens for j in jobs))
        self.options = [option for number, job in enumerate(jobs) for option in self._options(number, job)]
        last_s = max(option.end_s for option in self.options)
        self.intervals = int(last_s / shape.interval_s) + 2
        self.columns = self.intervals + len(self.options)
        self.upper = [np.inf] * self.intervals + [1.0] * len(self.options)
        self.rows = _Rows()
        self._segments()
        self._options_of: dict[int, list[int]] = {}
        for number, option in enumerate(self.options):
            self._options_of.setdefault(option.request, []).append(number)

    def solve(self) -> float:
        """The share served."""
        self._add_requests()
        self._add_decoding()
        cost = np.zeros(self.columns)
        cost[self.intervals : self.intervals + len(self.options)] = -1.0
        rows = self.rows
        matrix = coo_matrix((rows.value, (rows.row, rows.column)), shape=(len(rows.limit), self.columns))
        bounds = np.column_stack([np.zeros(self.columns), np.array(self.upper)])
        found = linprog(cost, matrix.tocsr(), np.array(rows.limit), bounds=bounds, method="highs-ipm")
        if found.status != 0:
            raise RuntimeError(f"the linear program was not solved: {found.message}")
        return float(-found.fun) / len(self.jobs)

    def _options(self, number: int, job: Job) -> list[_Option]:
        call = job.calls[0]
        earliest_s = job.arrival_s + self.model.zero_load_prefill_s(call.prompt_tokens - call.cached_tokens)
        span_s = max(0.0, job.arrival_s + call.ttft_s - earliest_s)
        shortest_s = min(stage.tpot_s for stage in call.stages)
        step_s = self.model.zero_load_prefill_s(1)
        paces = [pace for pace in self.shape.paces if pace == 1.0 or pace * shortest_s >= step_s]
        return [
            _Option(number, earliest_s + share * span_s, _decode(call, pace))
            for share in self.shape.starts
            for pace in paces
        ]

    def _segments(self) -> None:
        """The rows of time, one per interval and segment, and those of memory."""
        self.time: list[list[int]] = []
        for interval in range(self.intervals):
            rows = []
            for _, _, _, _, b in self.model.rows:
                row = self.rows.new(self.shape.interval_s)
                self.rows.put(row, interval, b)
                rows.append(row)
            self.time.append(rows)
        self.memory = [self.rows.new(self.kv_tokens) for _ in range(self.intervals // self.shape.coarse + 1)]

    def _use(self, interval: int, column: int, tokens: float, requests: float, context: float) -> None:
        for row, (k_tok, k_ctx, k_req, _, _) in zip(self.time[interval], self.model.rows, strict=True):
            value = k_tok * tokens + k_req * requests + k_ctx * context
            if value:
                self.rows.put(row, column, value)

    def _add_requests(self) -> None:
        """Every request once; its prompt before its first token."""
        rate = min(1.0 / row[0] for row in self.model.rows if row[0] > 0)
        length_s = self.shape.interval_s
        for number, job in enumerate(self.jobs):
            options = self._options_of[number]
            once = self.rows.new(1.0)
            for option in options:
                self.rows.put(once, self.intervals + option, 1.0)
            call = job.calls[0]
            prompt = call.prompt_tokens - call.cached_tokens
            due_s = job.arrival_s + call.ttft_s
            starts = sorted({self.options[option].start_s for option in options})
            prompt_rows = {start_s: self.rows.new(0.0) for start_s in starts}
            for option in options:
                for start_s, row in prompt_rows.items():
                    if self.options[option].start_s <= start_s:
                        self.rows.put(row, self.intervals + option, prompt)
            for interval in range(int(job.arrival_s / length_s), int(due_s / length_s) + 1):
                begin_s, end_s = interval * length_s, (interval + 1) * length_s
                overlap_s = min(end_s, due_s) - max(begin_s, job.arrival_s)
                if overlap_s <= 0:
                    continue
                column = self._new_column(overlap_s * rate)
                self._use(interval, column, 1.0, 0.0, 0.0)
                for start_s, row in prompt_rows.items():
                    if begin_s < start_s:
                        self.rows.put(row, column, -1.0)

    def _add_decoding(self) -> None:
        """Tokens, batches and memory of every option after its first token."""
        coarse_s = self.shape.interval_s * self.shape.coarse
        pace_rows: dict[tuple[int, int], int] = {}
        for number, option in enumerate(self.options):
            column = self.intervals + number
            held = self.jobs[option.request].calls[0].prompt_tokens + 1.0
            clock_s = option.start_s
            for tokens, period_s in option.stages:
                end_s = clock_s + tokens * period_s
                for interval, overlap_s in _overlaps(clock_s, end_s, self.shape.interval_s):
                    made = overlap_s / period_s
                    self._use(interval, column, made, made, made * held)
                    group = interval // self.shape.coarse
                    key = (option.request, group)
                    if key not in pace_rows:
                        pace_rows[key] = self._new_pace_row(group)
                    self.rows.put(pace_rows[key], column, made)
                    self.rows.put(self.memory[group], column, held * overlap_s / coarse_s)
                    held += made
                clock_s = end_s

    def _new_pace_row(self, group: int) -> int:
        """As many batches in these intervals as the request makes tokens."""
        row = self.rows.new(0.0)
        for interval in range(group * self.shape.coarse, min(self.intervals, (group + 1) * self.shape.coarse)):
            self.rows.put(row, interval, -1.0)
        return row

    def _new_column(self, upper: float) -> int:
        self.upper.append(upper)
        self.columns += 1
        return self.columns - 1


def _decode(call: Call, pace: float) -> tuple[tuple[int, float], ...]:
    """Tokens after the first by stage, and their period."""
    stages = [(stage.tokens, stage.tpot_s * pace) for stage in call.stages]
    stages[0] = (stages[0][0] - 1, stages[0][1])
    return tuple((tokens, period_s) for tokens, period_s in stages if tokens > 0)


def _overlaps(begin_s: float, end_s: float, length_s: float) -> list[tuple[int, float]]:
    """Intervals that [begin, end) touches, and for how long."""
    first, last = int(begin_s / length_s), int(end_s / length_s)
    pieces = ((i, min(end_s, (i + 1) * length_s) - max(begin_s, i * length_s)) for i in range(first, last + 1))
    return [(interval, overlap_s) for interval, overlap_s in pieces if overlap_s > 0]
