"""Every plan with its inputs, as JSON lines, for `python -m bench replay`. Bounded: two files, each half of the size.

Off unless `SLOS_DECISION_LOG` names a file. A log that can no longer be written is reported once and given up: planning
goes on.
"""

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from services.common.clock import Clock
from services.common.config import ConfigError
from services.planner.promises import PlanRun
from services.planner.recording import run_to_json

__all__ = ["DecisionLog"]

_log = logging.getLogger(__name__)


class DecisionLog:
    """Appends runs to `path`; when it reaches half of `max_bytes` it is moved to `path` + `.1` and begun anew."""

    def __init__(self, path: Path, max_bytes: int, clock: Clock) -> None:
        """Open the log; `ConfigError` where the file cannot be written."""
        self._path = path
        self._half_bytes = max_bytes // 2
        self._clock = clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO | None = self._open()
        except OSError as error:
            raise ConfigError(f"SLOS_DECISION_LOG: cannot write {path}: {error.strerror}") from None

    def record(self, run: PlanRun) -> None:
        """Append one run."""
        if self._file is None:
            return
        line = json.dumps(run_to_json(run, self._clock.now_us()), separators=(",", ":"), allow_nan=False)
        try:
            if self._file.tell() + len(line) > self._half_bytes and self._file.tell() > 0:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._file = self._open()
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            _log.error("decision log %s given up: %s", self._path, error)
            self._file = None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> TextIO:
        return self._path.open("a", encoding="utf-8")
