"""The requests of the demo: three applications cut out of recorded traces, slowed down and shortened.

Chat and code arrive as they truly did, simultaneously; summaries take chat arrivals and lengths of arXiv papers, as
that set has none of its own. One factor stretches all arrivals, so bursts stay bursts; one divisor shortens all
lengths, so their proportions stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.workload import TraceRow, load_lengths, load_trace, scale_load, window, with_lengths

__all__ = ["DemoRequest", "DemoWorkload", "demo_workload"]

_WINDOW_START_S = 900.0  # the window this field uses for these traces
_MIXED_SECONDS = 4.0
_SUMMARY_SECONDS = 1.6  # of chat arrivals, spread over the same time: summaries come 2.5 times slower
_MIN_PROMPT_TOKENS = 16  # what readable text of its own beginning takes
_MIN_OUTPUT_TOKENS = 4
_SEED = 2504


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One request: when it is sent, and what it asks for."""

    at_s: float
    application: str
    prompt_tokens: int
    output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class DemoWorkload:
    """The requests by time, and how they differ from the record: `stretch` x slower, lengths / `length_divisor`."""

    requests: tuple[DemoRequest, ...]
    seconds: float
    stretch: float
    length_divisor: float


def _shortened(rows: Sequence[TraceRow], divisor: float, max_prompt: int, max_output: int) -> tuple[DemoRequest, ...]:
    return tuple(
        DemoRequest(
            at_s=row.arrival_s,
            application=row.application,
            prompt_tokens=min(max_prompt, max(_MIN_PROMPT_TOKENS, round(row.prompt_tokens / divisor))),
            output_tokens=min(max_output, max(_MIN_OUTPUT_TOKENS, round(row.output_tokens / divisor))),
            seed=_SEED + index,
        )
        for index, row in enumerate(rows)
    )


def demo_workload(
    seconds: float, *, length_divisor: float, load: float = 1.0, max_prompt_tokens: int, max_output_tokens: int
) -> DemoWorkload:
    """A few dozen requests over `seconds`; `load` 2 sends twice as much of the trace in that time.

    Lengths beyond what the model's context holds are cut to the two maxima.
    """
    span_s = _MIXED_SECONDS * load
    mixed = window(load_trace("azure2023_mixed_conv_code"), _WINDOW_START_S, _WINDOW_START_S + span_s)
    arrivals = window(load_trace("azure2023_conv"), _WINDOW_START_S, _WINDOW_START_S + _SUMMARY_SECONDS * load)
    summaries = with_lengths(arrivals, load_lengths("arxiv_summarization_lengths"), "summarizer", _SEED)
    factor = span_s / seconds
    rows = [*scale_load(mixed, factor), *scale_load(summaries, _SUMMARY_SECONDS / _MIXED_SECONDS * factor)]
    rows.sort(key=lambda row: row.arrival_s)
    return DemoWorkload(
        requests=_shortened(rows, length_divisor, max_prompt_tokens, max_output_tokens),
        seconds=seconds,
        stretch=1 / factor,
        length_divisor=length_divisor,
    )
