"""Shows the stack coming up: a live list on a terminal, one line per service elsewhere."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from services.cli.stack_spec import ServiceEvent, ServiceState

__all__ = ["StartDisplay"]

_LOG_CHARS = 70
_TAIL_BYTES = 4096


@dataclass(slots=True)
class _Line:
    event: ServiceEvent
    since_s: float


class StartDisplay:
    """Hears of the stack's events; use as a context manager around the start."""

    def __init__(self, console: Console, log_dir: Path) -> None:
        self._console = console
        self._log_dir = log_dir
        self._lines: dict[str, _Line] = {}
        self._live = Live(self, console=console, refresh_per_second=10) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: ServiceEvent) -> None:
        """A service changed state."""
        self._lines[event.name] = _Line(event, time.monotonic())
        if self._live is None and event.state is ServiceState.READY:
            self._console.print(f"  {event.name:<12} ready  {event.elapsed_s:5.1f} s  {event.address}", highlight=False)

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for name, line in self._lines.items():
            ready = line.event.state is ServiceState.READY
            elapsed_s = line.event.elapsed_s if ready else time.monotonic() - line.since_s
            table.add_row(
                Text(" ✓", style="green") if ready else Spinner("dots", style="cyan"),
                Text(name, style="bold"),
                Text(f"{elapsed_s:5.1f} s", style="dim"),
                Text(line.event.address if ready else self._last_log_line(name), style="" if ready else "dim"),
            )
        return table

    def _last_log_line(self, name: str) -> str:
        """What a starting service is busy with, in its own words."""
        try:
            with (self._log_dir / f"{name}.log").open("rb") as log:
                log.seek(0, 2)
                log.seek(max(0, log.tell() - _TAIL_BYTES))
                lines = log.read().decode("utf-8", "replace").split("\n")
        except FileNotFoundError:
            return ""
        return next((text.strip()[:_LOG_CHARS] for text in reversed(lines) if text.strip()), "")
