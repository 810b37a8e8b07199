"""Every OpenTelemetry instrument of the project, one group per service.

Names and buckets of `gen_ai.*` follow the OpenTelemetry GenAI conventions; our own names start with `slos_serve.`.
Attributes are low in cardinality: application, tier, replica, verdict, reason; never a request id. A process builds its
group once, after telemetry has started.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Counter, Histogram, Meter, Observation, UpDownCounter
from opentelemetry.metrics import _Gauge as Gauge

from services.common.tasks import count_tasks

__all__ = [
    "PROVIDER",
    "TASKS",
    "AdmissionInstruments",
    "PlannerInstruments",
    "WorkerInstruments",
    "admission_instruments",
    "gen_ai_attributes",
    "observe_tasks",
    "planner_instruments",
    "worker_instruments",
]

PROVIDER = "slos_serve"
TASKS = "slos_serve.asyncio.tasks"

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_PLAN_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_PLACEMENT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


def _meter(meter: Meter | None) -> Meter:
    return meter or metrics.get_meter("slos_serve")


def gen_ai_attributes(model: str) -> dict[str, str]:
    """The attributes that the GenAI conventions require on every `gen_ai.server.*` measurement."""
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
    }


def observe_tasks(loop: asyncio.AbstractEventLoop, meter: Meter | None = None) -> None:
    """Measure the live tasks of `loop` by kind at every export. Idle, a service has always the same ones."""

    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for kind, number in count_tasks(loop).items():
            yield Observation(number, {"slos_serve.task": kind})

    _meter(meter).create_observable_gauge(
        TASKS, [observe], unit="{task}", description="Live asyncio tasks, by the coroutine they run"
    )


@dataclass(frozen=True, slots=True)
class AdmissionInstruments:
    """What the front door measures, as its clients saw it.

    Attainment of an application is `stages met` over `offered`: `requests` with `slos_serve.met` true divided by
    `offered`, which counts every valid request when it arrives, the rejected ones included.
    """

    time_to_first_token_s: Histogram
    time_per_output_token_s: Histogram
    request_duration_s: Histogram
    offered: Counter
    requests: Counter
    stages: Counter
    promises: Counter
    errors: Counter
    task_failures: Counter
    output_tokens: Counter
    prompt_tokens: Counter
    replacements: Counter
    live: UpDownCounter
    delivery_lag_s: Histogram
    clock_skew_s: Gauge


def admission_instruments(meter: Meter | None = None) -> AdmissionInstruments:
    """The front door's instruments, on the global meter unless one is given."""
    m = _meter(meter)
    return AdmissionInstruments(
        time_to_first_token_s=m.create_histogram(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="Arrival to first token sent",
            explicit_bucket_boundaries_advisory=_TTFT_S,
        ),
        time_per_output_token_s=m.create_histogram(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="Mean time per output token of a stage, after its first token",
            explicit_bucket_boundaries_advisory=_TPOT_S,
        ),
        request_duration_s=m.create_histogram(
            "gen_ai.server.request.duration",
            unit="s",
            description="Arrival to the last message",
            explicit_bucket_boundaries_advisory=_DURATION_S,
        ),
        offered=m.create_counter("slos_serve.offered", description="Valid requests that arrived"),
        requests=m.create_counter("slos_serve.requests", description="Requests by verdict, outcome, and SLOs met"),
        stages=m.create_counter("slos_serve.stages", description="Ended stages by kind and SLO met"),
        promises=m.create_counter("slos_serve.promises", description="Promises kept and broken"),
        errors=m.create_counter("slos_serve.errors", description="Calls refused or failed, by reason"),
        task_failures=m.create_counter(
            "slos_serve.task_failures", unit="{failure}", description="Own tasks that failed, by what they run"
        ),
        output_tokens=m.create_counter("slos_serve.output_tokens", unit="{token}", description="Tokens sent"),
        prompt_tokens=m.create_counter("slos_serve.prompt_tokens", unit="{token}", description="Prompt tokens"),
        replacements=m.create_counter("slos_serve.replacements", description="Requests placed again, by outcome"),
        live=m.create_up_down_counter("slos_serve.live_requests", description="Requests in this process"),
        delivery_lag_s=m.create_histogram(
            "slos_serve.delivery_lag",
            unit="s",
            description="End of a first token's batch to its sending",
            explicit_bucket_boundaries_advisory=_TTFT_S,
        ),
        clock_skew_s=m.create_gauge(
            "slos_serve.clock_skew", unit="s", description="Worker clock minus admission clock, at subscription"
        ),
    )


@dataclass(frozen=True, slots=True)
class PlannerInstruments:
    """What planning costs and decides, and how promises end, by replica and application."""

    plan_duration_s: Histogram
    plan_decisions: Counter
    audited_promises: Counter
    running: Gauge


def planner_instruments(meter: Meter | None = None) -> PlannerInstruments:
    """The planner's instruments, on the global meter unless one is given."""
    m = _meter(meter)
    return PlannerInstruments(
        plan_duration_s=m.create_histogram(
            "slos_serve.plan.duration",
            unit="s",
            description="One plan of the scheduling core",
            explicit_bucket_boundaries_advisory=_PLAN_S,
        ),
        plan_decisions=m.create_counter(
            "slos_serve.plan.decisions", description="Candidates decided, by verdict and binding constraint"
        ),
        audited_promises=m.create_counter(
            "slos_serve.audit.promises", description="Promises that ended, kept or broken, by application and cause"
        ),
        running=m.create_gauge("slos_serve.plan.running", description="Requests in the replica's engine when planned"),
    )


@dataclass(frozen=True, slots=True)
class RouterInstruments:
    """What the router measures: placements by outcome and duration, and every replica asked."""

    placements: Counter
    placement_duration_s: Histogram
    hops: Counter


def router_instruments(meter: Meter | None = None) -> RouterInstruments:
    """The router's instruments, on the global meter unless one is given."""
    m = _meter(meter)
    return RouterInstruments(
        placements=m.create_counter("slos_serve.placements", description="Placements by verdict or error reason"),
        placement_duration_s=m.create_histogram(
            "slos_serve.placement.duration",
            unit="s",
            description="Call to the queue's acknowledgement",
            explicit_bucket_boundaries_advisory=_PLACEMENT_S,
        ),
        hops=m.create_counter("slos_serve.hops", description="Replicas asked, by verdict"),
    )


@dataclass(frozen=True, slots=True)
class WorkerInstruments:
    """What a replica holds and how its requests went, by replica, tier and reason."""

    running: Gauge
    waiting: Gauge
    free_blocks: Gauge
    queue_duration_s: Histogram
    ended: Counter
    preemptions: Counter
    pauses: Counter
    demotions: Counter


def worker_instruments(meter: Meter | None = None) -> WorkerInstruments:
    """The worker's instruments, on the global meter unless one is given."""
    m = _meter(meter)
    return WorkerInstruments(
        running=m.create_gauge("slos_serve.engine.running", description="Requests in the engine's batches"),
        waiting=m.create_gauge("slos_serve.engine.waiting", description="Requests waiting in the engine"),
        free_blocks=m.create_gauge("slos_serve.engine.free_blocks", description="KV blocks that are free"),
        queue_duration_s=m.create_histogram(
            "slos_serve.queue.duration",
            unit="s",
            description="Entry appended to start of its prefill",
            explicit_bucket_boundaries_advisory=_PLACEMENT_S,
        ),
        ended=m.create_counter(
            "slos_serve.engine.requests", description="Requests that ended, by finish reason and missed SLO"
        ),
        preemptions=m.create_counter("slos_serve.engine.preemptions", description="Requests that lost their KV blocks"),
        pauses=m.create_counter(
            "slos_serve.engine.pauses", description="Preemptions of promised decoders that were far ahead"
        ),
        demotions=m.create_counter("slos_serve.engine.demotions", description="Requests moved to best effort"),
    )
