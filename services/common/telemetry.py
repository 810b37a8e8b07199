"""OpenTelemetry for a process: providers, exporters, context on the wire.

The standard `OTEL_*` variables choose an OTLP exporter (`OTEL_EXPORTER_OTLP_ENDPOINT`, or the per-signal ones). Without
an endpoint, finished spans go to a bounded local file that `slosctl trace` reads. Instruments live in
`services/common/instruments.py`.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract, inject
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode

from services.common.instruments import observe_tasks
from services.common.span_file import SpanFileExporter

__all__ = [
    "Telemetry",
    "TraceContext",
    "context_from",
    "current_context",
    "record_span",
    "start_telemetry",
    "traces_endpoint",
]

AttributeValue = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]

_SPAN_EXPORT_DELAY_MS = 500


@dataclass(frozen=True, slots=True)
class Telemetry:
    """The providers of this process; `shutdown` flushes them."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider

    def shutdown(self) -> None:
        """Flush and stop the exporters."""
        self.tracer_provider.shutdown()
        self.meter_provider.shutdown()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """W3C trace context as two strings, the form it has in a stream entry."""

    traceparent: str = ""
    tracestate: str = ""


def _otlp(signal: str) -> str | None:
    """The endpoint of a signal, its own before the common one; an empty variable counts as none."""
    common = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or common or None


def traces_endpoint() -> str | None:
    """Where spans go by OTLP; None where they go to local files."""
    return _otlp("TRACES")


def start_telemetry(service: str, instance: str, data_dir: Path) -> Telemetry:
    """Install the global providers for `service` (such as `admission`), identified by `instance`.

    Call on the service's event loop: its tasks are measured from here on.
    """
    resource = Resource.create(
        {"service.name": f"slos-serve-{service}", "service.namespace": "slos-serve", "service.instance.id": instance}
    )
    tracers = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter() if _otlp("TRACES") else SpanFileExporter(data_dir / "traces", service)
    tracers.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_SPAN_EXPORT_DELAY_MS))
    readers: list[MetricReader] = [PeriodicExportingMetricReader(OTLPMetricExporter())] if _otlp("METRICS") else []
    meters = MeterProvider(resource=resource, metric_readers=readers)
    trace.set_tracer_provider(tracers)
    metrics.set_meter_provider(meters)
    observe_tasks(asyncio.get_running_loop())
    return Telemetry(tracers, meters)


def current_context() -> TraceContext:
    """The active span's context, to be sent along."""
    carrier: dict[str, str] = {}
    inject(carrier)
    return TraceContext(carrier.get("traceparent", ""), carrier.get("tracestate", ""))


def context_from(sent: TraceContext) -> Context:
    """The OpenTelemetry context of one that was sent along."""
    return extract({"traceparent": sent.traceparent, "tracestate": sent.tracestate})


def record_span(
    name: str,
    start_us: int,
    end_us: int,
    parent: Context,
    attributes: Mapping[str, AttributeValue] | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    error: str | None = None,
) -> Span:
    """Record a span whose start and end (Unix microseconds) are already known."""
    span = trace.get_tracer("slos_serve").start_span(
        name, context=parent, kind=kind, attributes=attributes, start_time=start_us * 1000
    )
    if error is not None:
        span.set_status(StatusCode.ERROR, error)
    span.end(end_time=end_us * 1000)
    return span
