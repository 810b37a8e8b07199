from io import StringIO

import pytest
from rich.console import Console

from services.cli.waterfall import arrange, bar, render_waterfall
from services.common.span_file import SpanRecord


def span(name: str, span_id: str, parent: str | None, start_us: int, end_us: int, **attributes: str) -> SpanRecord:
    return SpanRecord("ab" * 16, span_id, parent, name, "slos-serve-admission", start_us, end_us, "UNSET", attributes)


def test_spans_come_in_tree_order_by_start() -> None:
    spans = [
        span("decode ANSWER", "d", "a", 50, 90),
        span("request", "a", None, 0, 100),
        span("plan", "c", "b", 12, 13),
        span("route", "b", "a", 10, 20),
    ]
    assert [(row.span.name, row.depth) for row in arrange(spans)] == [
        ("request", 0),
        ("route", 1),
        ("plan", 2),
        ("decode ANSWER", 1),
    ]


def test_children_of_a_hidden_grpc_span_move_up() -> None:
    spans = [
        span("request", "a", None, 0, 100),
        span("/slosserve.v1.Router/Place", "b", "a", 10, 20, **{"rpc.system": "grpc"}),
        span("route", "c", "b", 11, 19),
    ]
    assert [(row.span.name, row.depth) for row in arrange(spans)] == [("request", 0), ("route", 1)]
    assert len(arrange(spans, with_rpc=True)) == 3


def test_a_span_whose_parent_is_elsewhere_is_a_root() -> None:
    assert arrange([span("request", "a", "not-recorded", 0, 100)])[0].depth == 0


@pytest.mark.parametrize(
    ("start", "end", "drawn"),
    [
        (0.0, 1.0, "████████"),
        (0.5, 1.0, "    ████"),
        (0.0, 0.0, "▏       "),
        (1.0, 1.0, "       ▏"),
        (0.25, 0.3125, "  ▌     "),
    ],
)
def test_bars_lie_where_their_spans_do(start: float, end: float, drawn: str) -> None:
    assert bar(start, end, 8) == drawn


def test_the_waterfall_names_every_span_and_its_milliseconds() -> None:
    console = Console(width=140, record=True, file=StringIO())
    spans = [span("request", "a", None, 0, 250_000), span("admit", "b", "a", 1_500, 4_000)]
    console.print(render_waterfall(spans, width=140))
    lines = console.export_text().splitlines()
    assert any("request" in line and "250" in line for line in lines)
    assert any("admit" in line and "1.50" in line and "2.50" in line for line in lines)
