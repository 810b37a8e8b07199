"""What the demo shows while its requests run: a live panel on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bench.demo_outcome import Outcome, Progress

__all__ = ["LiveDisplay"]

_LINE_EVERY_S = 5.0
_DONE = (Progress.ANSWERED, Progress.REJECTED, Progress.FAILED)


class LiveDisplay:
    """Draws the outcomes as they change; rich calls `__rich__` on every refresh."""

    def __init__(self, console: Console, outcomes: Sequence[Outcome], seconds: float) -> None:
        self._console = console
        self._outcomes = outcomes
        self._seconds = seconds
        self._began_s = time.monotonic()
        self._last_line_s = self._began_s
        self._live = Live(self, console=console, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Something changed; where there is no terminal, print a line now and then."""
        now_s = time.monotonic()
        if self._live is None and now_s - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now_s
            self._console.print(self._line(now_s - self._began_s))

    def __rich__(self) -> RenderableType:
        elapsed_s = time.monotonic() - self._began_s
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            ProgressBar(total=self._seconds, completed=min(elapsed_s, self._seconds), width=40),
            Text(self._line(elapsed_s)),
        )
        return Group(grid, self._by_application())

    def _line(self, elapsed_s: float) -> str:
        done = sum(outcome.progress in _DONE for outcome in self._outcomes)
        tokens = sum(outcome.num_tokens for outcome in self._outcomes)
        return f"{elapsed_s:4.0f} s   {done}/{len(self._outcomes)} requests done   {tokens:,} tokens out"

    def _by_application(self) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 1))
        table.add_column("application", min_width=12)
        for header in ("sent", "streaming", "done", "promised", "best effort", "refused", "tokens"):
            table.add_column(header, justify="right", min_width=9)
        for name in sorted({outcome.request.application for outcome in self._outcomes}):
            mine = [outcome for outcome in self._outcomes if outcome.request.application == name]
            told = [outcome for outcome in mine if outcome.verdict is not None]
            refused = sum(outcome.progress in (Progress.REJECTED, Progress.FAILED) for outcome in mine)
            table.add_row(
                name,
                str(sum(outcome.progress is not Progress.PLANNED for outcome in mine)),
                Text(str(sum(outcome.progress is Progress.STREAMING for outcome in mine)), style="cyan"),
                str(sum(outcome.progress is Progress.ANSWERED for outcome in mine)),
                Text(str(sum(outcome.admitted for outcome in told)), style="green"),
                Text(str(sum(not outcome.admitted for outcome in told)), style="yellow"),
                Text(str(refused), style="red" if refused else "dim"),
                f"{sum(outcome.num_tokens for outcome in mine):,}",
            )
        return table
