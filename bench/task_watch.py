"""Asyncio tasks of a stack's processes, as they say themselves: the receiving end of `slos_serve.asyncio.tasks`.

Every process of the stack exports its metrics here by OTLP under its name in the stack. Idle, a service has always the
same tasks, however often it was restarted: what it has beyond its idle ones was left behind.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics

from services.cli.service_process import ServiceFailedError
from services.common.instruments import TASKS

__all__ = ["TaskWatch"]

_PROCESS = "slos_serve.process"
_EVERY_MS = 500
_LOOKS = 3  # reports that one answer is taken from: a task that lives for a moment is in none or one of them
_SILENT_S = 30.0  # a process that says nothing for so long is not there


class TaskWatch:
    """Collects what the processes named in `names` report. Usage: `async with`, start them with `environments`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._reports: dict[str, deque[Counter[str]]] = {}
        self._idle: dict[str, Counter[str]] = {}
        self._arrived = asyncio.Condition()
        self._server = grpc.aio.server()
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        register: Any = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server  # published without types
        register(_Sink(self), self._server)

    async def __aenter__(self) -> Self:
        """Listen."""
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._server.stop(None)

    @property
    def environments(self) -> Mapping[str, Mapping[str, str]]:
        """Variables of each process, for `StackSpec.service_environment`."""
        shared = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://127.0.0.1:{self._port}",
            "OTEL_METRIC_EXPORT_INTERVAL": str(_EVERY_MS),
        }
        return {name: {**shared, "OTEL_RESOURCE_ATTRIBUTES": f"{_PROCESS}={name}"} for name in self._names}

    async def learn_idle(self) -> None:
        """Take what the processes have now for what they have when idle."""
        self._idle = {name: _union(reports) for name, reports in (await self._next_reports()).items()}

    async def surplus(self) -> dict[str, int]:
        """How many tasks each process has beyond its idle ones, by process and kind; empty where nothing was left."""
        found: dict[str, int] = {}
        for name, reports in (await self._next_reports()).items():
            steady = reports[0]
            for report in reports[1:]:
                steady &= report  # the smaller number of each kind
            for kind, number in (steady - self._idle.get(name, Counter())).items():
                found[f"{name}: {kind}"] = number
        return found

    def take(self, metrics: Sequence[ResourceMetrics]) -> None:
        """What one process has exported."""
        for resource in metrics:
            attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
            points = [
                point
                for scope in resource.scope_metrics
                for metric in scope.metrics
                if metric.name == TASKS
                for point in metric.gauge.data_points
            ]
            report = Counter({point.attributes[0].value.string_value: int(point.as_int) for point in points})
            if report:
                self._reports.setdefault(attributes.get(_PROCESS, ""), deque(maxlen=_LOOKS)).append(report)

    async def notify(self) -> None:
        """Something was taken."""
        async with self._arrived:
            self._arrived.notify_all()

    async def _next_reports(self) -> dict[str, list[Counter[str]]]:
        """The next reports of every process, all of them from now on."""
        self._reports.clear()

        def complete() -> bool:
            return all(len(self._reports.get(name, ())) == _LOOKS for name in self._names)

        try:
            async with asyncio.timeout(_SILENT_S), self._arrived:
                await self._arrived.wait_for(complete)
        except TimeoutError:
            silent = [name for name in self._names if len(self._reports.get(name, ())) < _LOOKS]
            raise ServiceFailedError(f"no word of their tasks from {', '.join(silent)}") from None
        return {name: list(self._reports[name]) for name in self._names}


class _Sink(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, watch: TaskWatch) -> None:
        self._watch = watch

    async def Export(self, request: Any, context: Any) -> metrics_service_pb2.ExportMetricsServiceResponse:  # noqa: N802  (named by gRPC)
        self._watch.take(request.resource_metrics)
        await self._watch.notify()
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _union(reports: Sequence[Counter[str]]) -> Counter[str]:
    """The larger number of each kind."""
    found: Counter[str] = Counter()
    for report in reports:
        found |= report
    return found
