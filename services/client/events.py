"""What a client is told about its request, as typed values. Times in milliseconds unless the name says otherwise."""

from dataclasses import dataclass

from protos import admission_pb2, types_pb2

__all__ = [
    "Constraint",
    "Event",
    "Finished",
    "StageEnd",
    "StageReport",
    "Tokens",
    "Verdict",
    "VerdictChanged",
    "event_from_wire",
    "report_from_wire",
    "verdict_from_wire",
]


@dataclass(frozen=True, slots=True)
class Constraint:
    """The one thing that decided a verdict, with its numbers. `kind` is such as `KV_BLOCKS`."""

    kind: str
    needed: float
    available: float
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind` is PENDING, ADMITTED (a promise) or BEST_EFFORT (none); REJECTED only inside an error.

    `retry_after_ms`: when the plan expects room for the same SLO, from then on; 0 where unknown or not needed.
    """

    kind: str
    replica_id: str
    tier: str
    predicted_ttft_ms: float
    predicted_tpot_ms: float
    ttft_slo_ms: float
    tpot_slo_ms: float
    constraint: Constraint | None
    retry_after_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """New output. `offset` is the index of `ids[0]` in the whole output."""

    text: str
    ids: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class StageReport:
    """Promised against delivered for one stage; a `ttft_slo_ms` of 0: it has no first token of its own."""

    kind: str
    ttft_slo_ms: float
    ttft_ms: float
    tpot_slo_ms: float
    tpot_ms: float
    output_tokens: int
    met: bool


@dataclass(frozen=True, slots=True)
class StageEnd:
    """A stage is over."""

    stage_index: int
    report: StageReport


@dataclass(frozen=True, slots=True)
class VerdictChanged:
    """Promoted, demoted, or placed again; `reason` says which and why."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event. `reason` is STOP, LENGTH or CANCELLED."""

    reason: str
    prompt_tokens: int
    output_tokens: int
    stages: tuple[StageReport, ...]
    met: bool
    promised: bool
    replica_id: str
    trace_id: str
    attempts: int


Event = Verdict | Tokens | StageEnd | VerdictChanged | Finished


def verdict_from_wire(wire: types_pb2.Verdict) -> Verdict:
    """A verdict as it came."""
    limit = wire.constraint
    return Verdict(
        kind=types_pb2.VerdictKind.Name(wire.kind).removeprefix("VERDICT_KIND_"),
        replica_id=wire.replica_id,
        tier=wire.tier,
        predicted_ttft_ms=wire.predicted_ttft_ms,
        predicted_tpot_ms=wire.predicted_tpot_ms,
        ttft_slo_ms=wire.ttft_slo_ms,
        tpot_slo_ms=wire.tpot_slo_ms,
        constraint=Constraint(
            types_pb2.ConstraintKind.Name(limit.kind).removeprefix("CONSTRAINT_KIND_"),
            limit.needed,
            limit.available,
            limit.detail,
        )
        if limit.kind
        else None,
        retry_after_ms=wire.retry_after_ms,
    )


def event_from_wire(wire: admission_pb2.GenerateEvent) -> Event | None:
    """The typed event; None for a kind that this version does not know."""
    match wire.WhichOneof("event"):
        case "verdict":
            return verdict_from_wire(wire.verdict)
        case "tokens":
            return Tokens(wire.tokens.text, tuple(wire.tokens.ids), wire.tokens.offset)
        case "stage_end":
            return StageEnd(wire.stage_end.stage_index, report_from_wire(wire.stage_end.report))
        case "verdict_changed":
            return VerdictChanged(verdict_from_wire(wire.verdict_changed.verdict), wire.verdict_changed.reason)
        case "finished":
            return _finished(wire.finished)
    return None


def report_from_wire(wire: admission_pb2.StageReport) -> StageReport:
    """A stage's report as it came."""
    return StageReport(
        kind=types_pb2.StageKind.Name(wire.kind).removeprefix("STAGE_KIND_"),
        ttft_slo_ms=wire.ttft_slo_ms,
        ttft_ms=wire.ttft_ms,
        tpot_slo_ms=wire.tpot_slo_ms,
        tpot_ms=wire.tpot_ms,
        output_tokens=wire.output_tokens,
        met=wire.met,
    )


def _finished(wire: admission_pb2.Finished) -> Finished:
    return Finished(
        reason=types_pb2.FinishReason.Name(wire.reason).removeprefix("FINISH_REASON_"),
        prompt_tokens=wire.prompt_tokens,
        output_tokens=wire.output_tokens,
        stages=tuple(report_from_wire(stage) for stage in wire.stages),
        met=wire.met,
        promised=wire.promised,
        replica_id=wire.replica_id,
        trace_id=wire.trace_id,
        attempts=wire.attempts,
    )
