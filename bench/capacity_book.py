"""Capacities as they are written down: one row per scenario, window, seed and system, kept between runs."""

import fcntl
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.report_files import load_result, markdown_table, provenance, write_result
from services.core.presets import Preset

__all__ = ["BASELINE", "ResultBook", "summary"]

BASELINE = "vllm"
"""The family that ratios refer to."""

Row = Mapping[str, Any]


class ResultBook:
    """The result files of one comparison. Rows measured under other settings are not mixed in.

    Several processes may add to one file side by side.
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], chosen: Preset, *, fresh: bool = False
    ) -> None:
        self.path = folder / f"{name}.json"
        self._settings = dict(settings)
        self._preset = chosen
        self._fresh = fresh
        self._rows: dict[tuple[Any, ...], Row] = {} if fresh else self._held()
        self._measured: dict[tuple[Any, ...], Row] = {}

    def add(self, row: Row) -> None:
        """Take a capacity in, in place of an older one, and write everything down."""
        found = provenance(self._preset)
        self._measured[_place(row)] = {**row, "commit": found["commit"]}
        with self._locked():
            self._rows = dict(self._measured) if self._fresh else {**self._held(), **self._measured}
            rows = [self._rows[place] for place in sorted(self._rows)]
            result = {"kind": "capacity", "settings": self._settings, "rows": rows, **found}
            write_result(self.path.parent, self.path.stem, result, self.text)

    @property
    def text(self) -> str:
        """The summary of all rows."""
        return summary([*self._rows.values()])

    def _held(self) -> dict[tuple[Any, ...], Row]:
        if not self.path.is_file():
            return {}
        held = load_result(self.path)
        if held["settings"] != self._settings or held["preset"]["name"] != self._preset.name:
            return {}
        return {_place(row): row for row in held["rows"]}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def summary(rows: Sequence[Row]) -> str:
    """Mean capacity over windows and seeds by scenario and family, the best member counting in every window.

    Families of ours are also given as multiples of vLLM's, over the windows that both were measured in.
    """
    families = sorted({row["family"] for row in rows}, key=lambda f: (f != BASELINE, f.startswith("slos"), f))
    compared = [family for family in families if family != BASELINE and BASELINE in families]
    ratios: dict[str, list[float]] = {family: [] for family in compared}
    lines = []
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        best = {f: _best(row for row in rows if row["scenario"] == scenario and row["family"] == f) for f in families}
        cells = [f"{_mean(best[family].values()):.2f}" if best[family] else "" for family in families]
        for family in compared:
            both = best[BASELINE].keys() & best[family].keys()
            below = _mean(best[BASELINE][place] for place in both) if both else 0.0
            if below <= 0:
                cells.append("")
                continue
            ratio = _mean(best[family][place] for place in both) / below
            ratios[family].append(ratio)
            cells.append(f"{ratio:.2f}")
        lines.append([scenario, *cells])
    if len(lines) > 1:
        lines.append(["geometric mean", *("" for _ in families), *(_geometric(ratios[f]) for f in compared)])
    header = ["capacity, jobs/s", *families, *(f"{family} / {BASELINE}" for family in compared)]
    return markdown_table(header, lines)


def _place(row: Row) -> tuple[Any, ...]:
    return row["scenario"], row["window"], row["seed"], row["family"], row["system"]


def _best(rows: Iterable[Row]) -> dict[tuple[int, int], float]:
    best: dict[tuple[int, int], float] = {}
    for row in rows:
        place = (row["window"], row["seed"])
        best[place] = max(best.get(place, 0.0), row["capacity"])
    return best


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _geometric(ratios: Sequence[float]) -> str:
    if not ratios or min(ratios) <= 0:
        return ""
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}"
