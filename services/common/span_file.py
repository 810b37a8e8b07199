"""Finished spans as JSON lines in a bounded local file: the exporter used when no OTLP endpoint is configured.

One file per process, `{service}-{pid}.jsonl`; at `MAX_BYTES` it is renamed to `.1` and a new one begun, so a process
keeps at most twice that. `read_spans` is the other half: it yields every span of a trace from a directory.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

__all__ = ["MAX_BYTES", "SpanFileExporter", "SpanRecord", "read_spans"]

MAX_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One finished span; times are Unix microseconds."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    service: str
    start_us: int
    end_us: int
    status: str
    attributes: dict[str, Any]


def _record(span: ReadableSpan) -> SpanRecord:
    return SpanRecord(
        trace_id=f"{span.context.trace_id:032x}",
        span_id=f"{span.context.span_id:016x}",
        parent_id=f"{span.parent.span_id:016x}" if span.parent else None,
        name=span.name,
        service=str(span.resource.attributes.get("service.name", "")),
        start_us=(span.start_time or 0) // 1000,
        end_us=(span.end_time or 0) // 1000,
        status=span.status.status_code.name,
        attributes=dict(span.attributes or {}),
    )


def _line(span: ReadableSpan) -> str:
    record = _record(span)
    # not asdict: its deep copy takes three times as long as all the rest, and the event loop waits for it
    return json.dumps({name: getattr(record, name) for name in SpanRecord.__slots__}, default=str) + "\n"


class SpanFileExporter(SpanExporter):
    """Appends finished spans to a file of this process."""

    def __init__(self, directory: Path, service: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"{service}-{os.getpid()}.jsonl"

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Append the spans; a full disk is reported to the span processor and costs only the spans."""
        lines = "".join(map(_line, spans))
        try:
            if self._path.exists() and self._path.stat().st_size + len(lines) > MAX_BYTES:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def read_spans(directory: Path, trace_id: str | None = None) -> Iterator[SpanRecord]:
    """Every span in the directory's files, of one trace where `trace_id` is given, in no particular order."""
    for path in sorted([*directory.glob("*.jsonl"), *directory.glob("*.jsonl.1")]):
        with path.open(encoding="utf-8") as file:
            for line in file:
                if trace_id is not None and trace_id not in line:
                    continue
                if line.endswith("\n"):  # the last line may still be being written
                    record = SpanRecord(**json.loads(line))
                    if trace_id is None or record.trace_id == trace_id:
                        yield record
