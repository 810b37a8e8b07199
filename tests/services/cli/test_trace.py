import json
from dataclasses import asdict
from pathlib import Path

import pytest

from services.cli.trace import TraceNotFoundError, find_trace
from services.common.span_file import SpanRecord


def write(directory: Path, *spans: SpanRecord) -> None:
    directory.mkdir(exist_ok=True)
    with (directory / "admission-1.jsonl").open("a") as file:
        file.writelines(json.dumps(asdict(span)) + "\n" for span in spans)


def span(trace_id: str, name: str = "request", end_us: int = 10) -> SpanRecord:
    return SpanRecord(trace_id, f"{hash((trace_id, name)):x}", None, name, "admission", 0, end_us, "UNSET", {})


A, B = "a1" * 16, "a2" * 16


def test_a_trace_is_found_by_id_by_prefix_and_as_the_latest(tmp_path: Path) -> None:
    write(tmp_path, span(A, end_us=10), span(A, "admit"), span(B, end_us=20))
    assert len(find_trace(tmp_path, A)) == 2
    assert len(find_trace(tmp_path, A[:8])) == 2
    assert find_trace(tmp_path, None)[0].trace_id == B


def test_an_ambiguous_prefix_asks_for_more_digits(tmp_path: Path) -> None:
    write(tmp_path, span(A), span(B))
    with pytest.raises(TraceNotFoundError, match="2 traces"):
        find_trace(tmp_path, "a")


def test_an_unknown_trace_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(TraceNotFoundError, match=str(tmp_path)):
        find_trace(tmp_path, A)
