"""The one request whose trace the demo shows."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from bench.demo_outcome import Outcome, Progress
from services.common.span_file import SpanRecord, read_spans

__all__ = ["completed_trace", "most_telling"]

_LONG_ENOUGH_TOKENS = 16
_POLL_S = 0.25


def most_telling(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The shortest answered request with a decode worth seeing, promised if possible: its small spans show too."""
    answered = [outcome for outcome in outcomes if outcome.progress is Progress.ANSWERED]
    promised = [outcome for outcome in answered if outcome.admitted] or answered
    decoding = [outcome for outcome in promised if outcome.num_tokens >= _LONG_ENOUGH_TOKENS] or promised
    return min(decoding, key=lambda outcome: outcome.num_tokens, default=None)


async def completed_trace(directory: Path, trace_id: str, timeout_s: float = 4.0) -> list[SpanRecord]:
    """The trace's spans once its `request` span is written and no more arrive; what there is after `timeout_s`."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    before = -1
    while True:
        spans = list(read_spans(directory, trace_id))
        complete = len(spans) == before and any(span.name == "request" for span in spans)
        if complete or loop.time() >= end_s:
            return spans
        before = len(spans)
        await asyncio.sleep(_POLL_S)
