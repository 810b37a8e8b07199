"""Spans of gRPC calls, made without interceptors."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protos import worker_pb2, worker_pb2_grpc
from services.common.errors import Reason, SloServeError
from services.common.rpc import RpcServer, open_channel


class Answering(worker_pb2_grpc.WorkerServicer):
    async def Cancel(  # noqa: N802 - the name is the contract's
        self, request: worker_pb2.WorkerCancelRequest, context: Any
    ) -> worker_pb2.WorkerCancelResponse:
        if request.reason == "bug":
            raise RuntimeError("a bug")
        if request.reason == "refuse":
            raise SloServeError(Reason.REQUEST_UNKNOWN, "no such request")
        return worker_pb2.WorkerCancelResponse(cancelled=True)

    async def Subscribe(  # noqa: N802 - the name is the contract's
        self, request: worker_pb2.SubscribeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.TokenBatch]:
        yield worker_pb2.TokenBatch(seq=1)


@pytest.fixture
def spans() -> InMemorySpanExporter:
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider, exporter = trace.get_tracer_provider(), InMemorySpanExporter()
    assert isinstance(provider, TracerProvider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0")
    worker_pb2_grpc.add_WorkerServicer_to_server(Answering(), server.grpc)
    await server.start([])
    yield f"127.0.0.1:{server.port}"
    await server.stop(0.0)


def of_kind(spans: InMemorySpanExporter, trace_id: int, kind: trace.SpanKind) -> list[Any]:
    return [s for s in spans.get_finished_spans() if s.context.trace_id == trace_id and s.kind is kind]


async def test_the_servers_span_is_the_child_of_the_clients_call(address: str, spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("tests").start_as_current_span("caller") as caller:
        async with open_channel(address) as channel:
            await worker_pb2_grpc.WorkerStub(channel).Cancel(worker_pb2.WorkerCancelRequest())
    trace_id = caller.get_span_context().trace_id
    [client] = of_kind(spans, trace_id, trace.SpanKind.CLIENT)
    [server] = of_kind(spans, trace_id, trace.SpanKind.SERVER)
    assert client.parent.span_id == caller.get_span_context().span_id
    assert server.parent.span_id == client.context.span_id
    assert server.attributes["rpc.method"] == "Cancel"
    assert server.status.status_code is trace.StatusCode.UNSET


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [
        ("bug", grpc.StatusCode.INTERNAL, trace.StatusCode.ERROR),
        ("refuse", grpc.StatusCode.NOT_FOUND, trace.StatusCode.UNSET),  # the caller's fault is no error of the server
    ],
)
async def test_a_failed_call_says_so_on_the_servers_span(
    address: str, spans: InMemorySpanExporter, reason: str, code: grpc.StatusCode, status: trace.StatusCode
) -> None:
    with trace.get_tracer("tests").start_as_current_span("caller") as caller:
        async with open_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await worker_pb2_grpc.WorkerStub(channel).Cancel(worker_pb2.WorkerCancelRequest(reason=reason))
    assert raised.value.code() is code
    [server] = of_kind(spans, caller.get_span_context().trace_id, trace.SpanKind.SERVER)
    assert server.attributes["rpc.grpc.status_code"] == code.value[0]
    assert server.status.status_code is status


async def test_a_stream_without_a_callers_context_has_no_span(address: str, spans: InMemorySpanExporter) -> None:
    async with open_channel(address, traced=False) as channel:
        batches = [b async for b in worker_pb2_grpc.WorkerStub(channel).Subscribe(worker_pb2.SubscribeRequest())]
    assert len(batches) == 1
    assert not [s for s in spans.get_finished_spans() if s.name.endswith("/Subscribe")]
