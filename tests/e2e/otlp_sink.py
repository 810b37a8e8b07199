"""An OTLP collector in the test process: keeps every span and metric name it is sent."""

import asyncio
from typing import Self

import grpc.aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class OtlpSink(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[str, Span]]] = {}  # by trace id: (service, span)
        self.metric_names: set[str] = set()
        self._arrived = asyncio.Condition()
        self._server = grpc.aio.server()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_MetricsSink(self), self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def Export(self, request, context):  # noqa: N802 - the name is the contract's
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.setdefault(span.trace_id.hex(), []).append((service, span))
        await self.notify()
        return trace_service_pb2.ExportTraceServiceResponse()

    async def notify(self) -> None:
        async with self._arrived:
            self._arrived.notify_all()

    async def wait_for(self, trace_id: str, names: set[str], timeout_s: float = 20.0) -> list[tuple[str, Span]]:
        """Every span of a trace, once all of `names` have arrived."""

        def complete() -> bool:
            return names <= {span.name for _, span in self.spans.get(trace_id, [])}

        async with asyncio.timeout(timeout_s), self._arrived:
            try:
                await self._arrived.wait_for(complete)
            except asyncio.CancelledError:
                seen = sorted({span.name for _, span in self.spans.get(trace_id, [])})
                raise AssertionError(f"trace {trace_id} has only {seen}") from None
        return self.spans[trace_id]

    async def wait_for_metrics(self, names: set[str], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s), self._arrived:
            await self._arrived.wait_for(lambda: names <= self.metric_names)


class _MetricsSink(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, sink: OtlpSink) -> None:
        self._sink = sink

    async def Export(self, request, context):  # noqa: N802 - the name is the contract's
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._sink.metric_names.update(metric.name for metric in scope.metrics)
        await self._sink.notify()
        return metrics_service_pb2.ExportMetricsServiceResponse()
