"""A trace as a waterfall: spans in tree order with bars on a common time axis."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.common.span_file import SpanRecord

__all__ = ["Row", "arrange", "bar", "render_waterfall"]

_MIN_BAR_CELLS, _MAX_BAR_CELLS = 16, 64
_OTHER_COLUMNS = 50  # what names and numbers take of a terminal's width
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLOURS = {"admission": "cyan", "router": "magenta", "planner": "yellow", "worker": "green"}


@dataclass(frozen=True, slots=True)
class Row:
    """A span at its depth in the tree of shown spans."""

    span: SpanRecord
    depth: int


def _is_rpc(span: SpanRecord) -> bool:
    return "rpc.system" in span.attributes or span.name.startswith("/")


def arrange(spans: Iterable[SpanRecord], *, with_rpc: bool = False) -> list[Row]:
    """Tree order, children by start. gRPC spans are left out unless asked for: their children move up to the next
    shown ancestor. A span whose parent was never recorded is a root.
    """
    known = {span.span_id: span for span in spans}
    shown = {span_id for span_id, span in known.items() if with_rpc or not _is_rpc(span)}
    children: dict[str | None, list[SpanRecord]] = defaultdict(list)
    for span_id in shown:
        parent = known[span_id].parent_id
        while parent is not None and parent not in shown:
            parent = known[parent].parent_id if parent in known else None
        children[parent].append(known[span_id])
    rows: list[Row] = []

    def visit(parent: str | None, depth: int) -> None:
        for span in sorted(children[parent], key=lambda child: (child.start_us, -child.end_us)):
            rows.append(Row(span, depth))
            visit(span.span_id, depth + 1)

    visit(None, 0)
    return rows


def bar(start: float, end: float, cells: int) -> str:
    """A bar from the cell of `start` (0..1 of the axis), as long as its span to an eighth of a cell, never empty."""
    begin = min(int(start * cells), cells - 1)
    eighths = max(1, min(round((end - start) * cells * 8), (cells - begin) * 8))
    full, rest = divmod(eighths, 8)
    text = " " * begin + "█" * full + (_EIGHTHS[rest] if rest else "")
    return text.ljust(cells)


def _milliseconds(us: int) -> str:
    ms = us / 1000
    return f"{ms:,.2f}" if ms < 10 else f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}"


def _service(span: SpanRecord) -> str:
    return span.service.removeprefix("slos-serve-")


def render_waterfall(spans: Sequence[SpanRecord], *, width: int, with_rpc: bool = False) -> RenderableType:
    """The waterfall of one trace for a terminal of `width`; `spans` must hold at least one span that is shown."""
    cells = min(_MAX_BAR_CELLS, max(_MIN_BAR_CELLS, width - _OTHER_COLUMNS))
    rows = arrange(spans, with_rpc=with_rpc)
    first_us = min(row.span.start_us for row in rows)
    last_us = max(row.span.end_us for row in rows)
    length_us = max(1, last_us - first_us)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("span", no_wrap=True)
    table.add_column("service", no_wrap=True)
    table.add_column("start ms", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column(Text(f"0{_milliseconds(length_us).rjust(cells - 4)} ms", style="dim"), no_wrap=True)
    for row in rows:
        span, service = row.span, _service(row.span)
        colour = "red" if span.status == "ERROR" else _COLOURS.get(service, "white")
        extent = bar((span.start_us - first_us) / length_us, (span.end_us - first_us) / length_us, cells)
        table.add_row(
            Text("  " * row.depth + span.name, style="bold" if row.depth == 0 else ""),
            Text(service, style=colour),
            _milliseconds(span.start_us - first_us),
            _milliseconds(span.end_us - span.start_us),
            Text(extent, style=colour),
        )
    title = Text.assemble("trace ", (rows[0].span.trace_id, "bold"), f"  {len(rows)} spans", style="")
    hidden = len(spans) - len(rows)
    if hidden:
        title.append(f" ({hidden} gRPC spans hidden)", style="dim")
    return Group(title, table)
