"""Recorded workloads: who asks when, with how long a prompt and how long an answer.

Reads the files of `bench/traces` (their README has columns, sources and licences), cuts a window out of them and
changes their load. Everything is deterministic: the same arguments give the same rows.
"""

import csv
import gzip
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Final

__all__ = [
    "TRACES",
    "Lengths",
    "StageRow",
    "TraceRow",
    "WorkloadError",
    "load_lengths",
    "load_sessions",
    "load_trace",
    "scale_load",
    "window",
    "with_lengths",
]

TRACES: Final = Path(__file__).parent / "traces"
"""The bundled files."""

# A trace with one application says so by its name; the mixed one has a column with these values.
APPLICATION_OF_TRACE: Final = {
    "azure2023_conv": "chatbot",
    "azure2023_code": "coder",
    "servegen_r1_realised_h10": "reasoner",
}
APPLICATION_OF_APP: Final = {"conv": "chatbot", "code": "coder"}


class WorkloadError(ValueError):
    """A file that is not there, lacks a column or holds a bad value, or an argument that makes no sense."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request: seconds since the start, lengths, application.

    `thinking_tokens` is the part of `output_tokens` spent before the answer, 0 where there is no thinking stage.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    application: str
    thinking_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of one request without an arrival; `thinking_tokens` as in `TraceRow`."""

    prompt_tokens: int
    output_tokens: int
    thinking_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StageRow:
    """One model call of a session; `prompt_tokens` counts the whole history so far.

    `start_s` is seconds since the session's first call and None where only the order is known; `calls_tool` is None
    where the source does not say what the output was.
    """

    session: str
    stage: int
    prompt_tokens: int
    output_tokens: int
    start_s: float | None
    calls_tool: bool | None


def load_trace(name: str, directory: Path = TRACES) -> tuple[TraceRow, ...]:
    """Every request of `{name}.csv.gz` in order of arrival.

    Raises WorkloadError if the file is missing, is malformed or has no arrivals.
    """
    return tuple(_trace_row(name, row) for row in _rows(name, directory))


def load_lengths(name: str, directory: Path = TRACES) -> tuple[Lengths, ...]:
    """The lengths in `{name}.csv.gz`, whether or not it has arrivals. Raises WorkloadError as `load_trace`."""
    return tuple(
        Lengths(_count(name, row, "prompt_tokens"), _count(name, row, "output_tokens"), _thinking(name, row))
        for row in _rows(name, directory)
    )


def load_sessions(name: str, directory: Path = TRACES) -> tuple[tuple[StageRow, ...], ...]:
    """The sessions of a stages file, each the sequence of its model calls. Raises WorkloadError as `load_trace`."""
    stages = [_stage_row(name, row) for row in _rows(name, directory)]
    return tuple(tuple(calls) for _, calls in groupby(stages, key=lambda stage: stage.session))


def window(rows: Sequence[TraceRow], start_s: float, end_s: float) -> tuple[TraceRow, ...]:
    """The requests that arrive in [start_s, end_s), with the window's start as the new zero.

    Raises WorkloadError if the window is empty or reversed.
    """
    if not 0 <= start_s < end_s:
        raise WorkloadError(f"window must satisfy 0 <= start_s < end_s, got {start_s} and {end_s}")
    return tuple(replace(row, arrival_s=row.arrival_s - start_s) for row in rows if start_s <= row.arrival_s < end_s)


def scale_load(rows: Sequence[TraceRow], factor: float) -> tuple[TraceRow, ...]:
    """The same requests at `factor` times the rate.

    Arrival times are divided rather than requests dropped, because random thinning makes a burst Poisson.
    Raises WorkloadError unless the factor is positive and finite.
    """
    if not (factor > 0 and math.isfinite(factor)):
        raise WorkloadError(f"load factor must be positive and finite, got {factor}")
    return tuple(replace(row, arrival_s=row.arrival_s / factor) for row in rows)


def with_lengths(
    rows: Sequence[TraceRow], lengths: Sequence[Lengths], application: str, seed: int
) -> tuple[TraceRow, ...]:
    """The arrivals of `rows` with lengths drawn from another file, for applications that have no arrivals of their own.

    Lengths are drawn without replacement until all were used. Raises WorkloadError if there are none.
    """
    if not lengths:
        raise WorkloadError("no lengths to draw from")
    random = Random(seed)
    drawn: list[Lengths] = []
    while len(drawn) < len(rows):
        drawn.extend(random.sample(lengths, len(lengths)))
    return tuple(
        TraceRow(row.arrival_s, length.prompt_tokens, length.output_tokens, application, length.thinking_tokens)
        for row, length in zip(rows, drawn, strict=False)  # more lengths than rows is normal
    )


def _rows(name: str, directory: Path) -> Iterator[dict[str, str]]:
    path = directory / f"{name}.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    except FileNotFoundError:
        known = ", ".join(sorted(found.name.removesuffix(".csv.gz") for found in directory.glob("*.csv.gz")))
        raise WorkloadError(f"no trace {name!r}; there are: {known}") from None


def _trace_row(name: str, row: dict[str, str]) -> TraceRow:
    return TraceRow(
        arrival_s=_seconds(name, row, "arrival_s"),
        prompt_tokens=_count(name, row, "prompt_tokens"),
        output_tokens=_count(name, row, "output_tokens"),
        application=_application(name, row),
        thinking_tokens=_thinking(name, row),
    )


def _stage_row(name: str, row: dict[str, str]) -> StageRow:
    return StageRow(
        session=_field(name, row, "session"),
        stage=_count(name, row, "stage"),
        prompt_tokens=_count(name, row, "prompt_tokens"),
        output_tokens=_count(name, row, "output_tokens"),
        start_s=_seconds(name, row, "t_in_session_s") if "t_in_session_s" in row else None,
        calls_tool=row["output_kind"] == "tool_call" if "output_kind" in row else None,
    )


def _application(name: str, row: dict[str, str]) -> str:
    if "app" not in row:
        return APPLICATION_OF_TRACE.get(name, name)
    try:
        return APPLICATION_OF_APP[row["app"]]
    except KeyError:
        raise WorkloadError(f"{name}: unknown app {row['app']!r}") from None


def _thinking(name: str, row: dict[str, str]) -> int:
    return _count(name, row, "reasoning_tokens") if "reasoning_tokens" in row else 0


def _field(name: str, row: dict[str, str], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise WorkloadError(f"{name}: column {column} is missing")
    return value


def _seconds(name: str, row: dict[str, str], column: str) -> float:
    value = _field(name, row, column)
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise WorkloadError(f"{name}: {column} must be seconds >= 0, got {value!r}")
    return seconds


def _count(name: str, row: dict[str, str], column: str) -> int:
    value = _field(name, row, column)
    if not value.isdecimal():
        raise WorkloadError(f"{name}: {column} must be a whole number >= 0, got {value!r}")
    return int(value)
