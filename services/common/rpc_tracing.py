"""Trace context across gRPC calls: a client span per call, a server span per handled call.

Interceptors would do the same, but grpc.aio runs an intercepted call in a task of its own and hands every message of an
intercepted stream from one coroutine to the next. Here the context travels as plain metadata and the calls stay as
they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import grpc
import grpc.aio
from opentelemetry import trace
from opentelemetry.propagate import extract, get_global_textmap, inject
from opentelemetry.trace import Span, SpanKind, StatusCode

__all__ = ["TracedChannel", "failed_call", "server_call"]

Metadata = Sequence[tuple[str, str | bytes]]

_tracer = trace.get_tracer("slos_serve.rpc")

_OUR_FAULT = frozenset(
    {
        *(grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS),
        *(grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED),
    }
)


def _attributes(path: str) -> dict[str, str]:
    service, _, method = path.lstrip("/").partition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}


@contextmanager
def _spanned(path: str, sent: dict[str, str]) -> Iterator[Span]:
    with _tracer.start_as_current_span(
        path,
        context=extract(sent),
        kind=SpanKind.SERVER,
        attributes=_attributes(path),
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def server_call(path: str, metadata: Iterable[Any], *, streams: bool) -> Any:
    """The server span of one handled call, as a context manager; it joins the caller's trace.

    A stream whose caller sent no context has none: it may last for days.
    """
    names = get_global_textmap().fields
    sent = {name: value for name, value in metadata if name in names}
    return nullcontext(trace.INVALID_SPAN) if streams and not sent else _spanned(path, sent)


def failed_call(span: Span, code: grpc.StatusCode, text: str) -> None:
    """Note on a server span that its call ended with an error."""
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code in _OUR_FAULT:
        span.set_status(StatusCode.ERROR, text)


class _TracedMethod:
    """One method of a channel; each call is a client span and carries its context."""

    def __init__(self, path: str, method: Any) -> None:
        self._path = path
        self._method = method
        self._attributes = _attributes(path)

    def __call__(self, request: Any = None, *, metadata: Metadata | None = None, **options: Any) -> Any:
        span = _tracer.start_span(self._path, kind=SpanKind.CLIENT, attributes=self._attributes)
        carrier: dict[str, str] = {}
        inject(carrier, trace.set_span_in_context(span))
        call = self._method(request, metadata=(*(metadata or ()), *carrier.items()), **options)
        call.add_done_callback(lambda _: span.end())
        return call


class TracedChannel(grpc.aio.Channel):
    """A channel whose calls with a single request join the current trace; streamed requests pass as they are."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel: Any = channel

    async def __aenter__(self) -> "TracedChannel":
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._channel.__aexit__(*exception)

    async def close(self, grace: float | None = None) -> None:
        """Close the channel and end the calls on it."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The state of the connection."""
        state: grpc.ChannelConnectivity = self._channel.get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Return once the state is another."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Return once it is connected."""
        await self._channel.channel_ready()

    def unary_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method with one request and one response."""
        return _TracedMethod(method, self._channel.unary_unary(method, *arguments, **options))

    def unary_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method with one request and a stream of responses."""
        return _TracedMethod(method, self._channel.unary_stream(method, *arguments, **options))

    def stream_unary(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method with a stream of requests and one response."""
        return self._channel.stream_unary(method, *arguments, **options)

    def stream_stream(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method with streams both ways."""
        return self._channel.stream_stream(method, *arguments, **options)
