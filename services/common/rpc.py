"""gRPC as every service uses it: one way to build a server, one way to build a channel.

A server serves `grpc.health.v1.Health` and reflection; its one interceptor maps `SloServeError` to its status for every
handler and joins the caller's OpenTelemetry trace. Streaming handlers must be async generators.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from services.common.accepting import Acceptors
from services.common.config import ConfigError
from services.common.errors import Reason, SloServeError, pushback_trailer, to_status
from services.common.rpc_tracing import TracedChannel, failed_call, server_call
from services.common.undecodable import undecodable

__all__ = ["MAX_MESSAGE_BYTES", "RpcServer", "open_channel"]

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
_MAX_PENDING = 20_000
_MAX_PENDING_S = 300
"""Calls that may have arrived and not begun, and for how long. gRPC's own limits (1000, and 3000 for certain; 30 s) end
what is beyond them with a bare CANCELLED; a service that is behind shall say so itself, with a reason and a delay."""

_log = logging.getLogger(__name__)

_STUBBORN_S = 5.0
_HEALTH_PREFIX = "/grpc.health.v1.Health/"

_KEEPALIVE: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class _WireStatus(NamedTuple):
    """What `abort_with_status` takes."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def _wire_status(error: SloServeError) -> _WireStatus:
    status = rpc_status.to_status(to_status(error))
    return _WireStatus(status.code, status.details, (*status.trailing_metadata, *pushback_trailer(error)))


class _Interceptor(grpc.aio.ServerInterceptor):
    """Runs each handler inside its server span and ends it with the status of the typed error that it raised.

    Any other error is INTERNAL, and logged.
    """

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # unknown method: gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        if method.startswith(_HEALTH_PREFIX):  # not ours; its Watch writes to the context instead of yielding
            return cast("grpc.RpcMethodHandler[Any, Any]", handler)
        wrap = _wrap_streaming if handler.response_streaming else _wrap_unary
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[(handler.request_streaming, handler.response_streaming)]
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        decode = handler.request_deserializer if handler.request_streaming else _decoder(handler.request_deserializer)
        wrapped = wrap(behaviour, method, handler_call_details.invocation_metadata or ())
        return make(wrapped, decode, handler.response_serializer)


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Decodes a request, or returns the error that its handler is to end with: gRPC itself would say INTERNAL."""

    def call(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return undecodable(decode.__self__.DESCRIPTOR, data)  # type: ignore[attr-defined]  # Message.FromString

    return call


def _checked(request: Any) -> Any:
    if isinstance(request, SloServeError):
        raise request
    return request


def _typed(error: Exception, method: str) -> SloServeError:
    if isinstance(error, SloServeError):
        return error
    _log.exception("unexpected error in %s", method, exc_info=error)
    return SloServeError(Reason.INTERNAL, f"unexpected {type(error).__name__} in {method}")


async def _abort(context: Any, span: Any, error: SloServeError) -> None:
    status = _wire_status(error)
    failed_call(span, status.code, error.text)
    await context.abort_with_status(status)


def _wrap_unary(
    behaviour: Callable[..., Awaitable[Any]], method: str, metadata: Sequence[Any]
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        with server_call(method, metadata, streams=False) as span:
            try:
                return await behaviour(_checked(request), context)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                await _abort(context, span, _typed(error, method))

    return call


def _wrap_streaming(
    behaviour: Callable[..., AsyncIterator[Any]], method: str, metadata: Sequence[Any]
) -> Callable[..., Awaitable[None]]:
    async def call(request: Any, context: Any) -> None:
        responses = None
        with server_call(method, metadata, streams=True) as span:
            try:
                responses = behaviour(_checked(request), context)
                async for response in responses:
                    await context.write(response)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                await _abort(context, span, _typed(error, method))
            finally:
                close = getattr(responses, "aclose", None)
                if close is not None:
                    await close()

    return call


class RpcServer:
    """A gRPC server with health, reflection, tracing and typed errors.

    Usage: add servicers to `.grpc`, then `await start([...service names])`, then `await stop(grace_s)`.
    """

    def __init__(self, address: str, *, crowded: Collection[str] = ()) -> None:
        """Bind `address` (host:port; port 0 picks a free one, see `port`). Raises ConfigError where it is taken.

        `crowded`: methods (`/package.Service/Method`) that thousands may call at once.
        """
        interceptors = (_Interceptor(),)
        self.grpc = grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.server.max_pending_requests", _MAX_PENDING),
                ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
                ("grpc.server_max_unrequested_time_in_server", _MAX_PENDING_S),
                *_KEEPALIVE,
            ],
        )
        self._acceptors = Acceptors(self.grpc, interceptors, crowded)
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._names: tuple[str, ...] = ()
        try:
            self.port = self.grpc.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"environment: SLOS_PORT: cannot listen on {address}; is it in use?") from None

    async def start(self, service_names: Sequence[str]) -> None:
        """Serve, with every named service healthy."""
        self._names = ("", *service_names)
        reflection.enable_server_reflection(
            (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            self.grpc,
        )
        await self.grpc.start()
        self._acceptors.start()
        await self.set_serving(True)

    async def set_serving(self, serving: bool) -> None:
        """Report every service as SERVING or NOT_SERVING (drain first, stop later)."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Stop accepting calls and end the open ones after `grace_s` seconds; one that will not end is left behind."""
        await self.set_serving(False)
        try:
            await asyncio.wait_for(self.grpc.stop(grace_s), grace_s + _STUBBORN_S)
        except TimeoutError:
            _log.warning("calls that were told to end have not after %.0f s", grace_s + _STUBBORN_S)
        await self._acceptors.ended(_STUBBORN_S)


def open_channel(address: str, *, traced: bool = True) -> grpc.aio.Channel:
    """A channel to another service. `traced` sends the current OpenTelemetry context along."""
    channel = grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 2_000),  # the time a busy server has to answer a connection attempt
            ("grpc.max_reconnect_backoff_ms", 1_000),
            *_KEEPALIVE,
        ],
    )
    return TracedChannel(channel) if traced else channel
