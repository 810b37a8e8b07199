"""The spans of one request in this process: `request` over its whole life, `deliver` from the first token on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode

from services.common.telemetry import TraceContext, context_from, current_context

__all__ = ["RequestTrace"]

Attributes = Mapping[str, str | bool | int | float]

_tracer = trace.get_tracer("slos_serve.admission")


class RequestTrace:
    """The span of a request's life in this process, and its children.

    Its parent is `parent`, or the span that is current: inside a gRPC handler, that of the call.
    """

    def __init__(self, name: str, attributes: Attributes, parent: TraceContext | None = None) -> None:
        context = context_from(parent) if parent is not None else None
        self._root = _tracer.start_span(name, context=context, attributes=dict(attributes))
        self._deliver: Span | None = None
        with trace.use_span(self._root):
            self.context: TraceContext = current_context()

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return f"{self._root.get_span_context().trace_id:032x}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes `request` the current span: calls and steps inside join it."""
        with trace.use_span(self._root, end_on_exit=False, record_exception=False, set_status_on_exception=False):
            yield

    @contextmanager
    def step(self, name: str) -> Iterator[Span]:
        """A child of the current span. A refusal is its status, not a stack trace: that costs more than the rest."""
        with _tracer.start_as_current_span(name, record_exception=False) as span:
            yield span

    def first_token(self) -> None:
        """The first token goes out."""
        if self._deliver is None:
            self._deliver = _tracer.start_span("deliver", context=trace.set_span_in_context(self._root))

    def end(self, attributes: Attributes, error: str | None = None) -> None:
        """The last message has left, or the request is given up."""
        for span in (self._deliver, self._root):
            if span is not None and span.is_recording():
                span.set_attributes(dict(attributes))
                if error is not None:
                    span.set_status(StatusCode.ERROR, error)
                span.end()
