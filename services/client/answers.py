"""Answers to Quote and Explain, as typed values."""

from dataclasses import dataclass

from google.protobuf import any_pb2

from protos import admission_pb2, types_pb2
from services.client.events import StageReport, Verdict, report_from_wire, verdict_from_wire
from services.common.errors import SloServeError

__all__ = ["Explanation", "HopReport", "Quote", "explanation_from_wire", "quote_from_wire", "rejected_verdict"]


@dataclass(frozen=True, slots=True)
class Quote:
    """Would the request be promised now? Nothing is reserved: an ADMITTED verdict here is not yet a promise.

    `tightest_ttft_ms`: the shortest TTFT that would be promised with the TPOT as asked. `tightest_tpot_ms`: the
    tightest tier that would be, with the TTFT as asked. `earliest_us`: from when on the SLO as asked would be, Unix
    microseconds. None: no such thing is known.
    """

    fits: bool
    verdict: Verdict
    tightest_ttft_ms: float | None
    tightest_tpot_ms: float | None
    earliest_us: int | None


@dataclass(frozen=True, slots=True)
class HopReport:
    """What one replica's planner said."""

    replica_id: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request is where it is. `verdict` is the one in force, `state` such as `running` or `rejected`.

    `stages` are promised against delivered, where the process that was asked served the request. `why` are sentences
    for people, one per fact.
    """

    state: str
    verdict: Verdict
    hops: tuple[HopReport, ...]
    stages: tuple[StageReport, ...]
    why: tuple[str, ...]


def quote_from_wire(wire: admission_pb2.QuoteResponse) -> Quote:
    """A quote as it came."""
    return Quote(
        wire.fits,
        verdict_from_wire(wire.verdict),
        wire.tightest_ttft_ms or None,
        wire.tightest_tpot_ms or None,
        wire.earliest_us or None,
    )


def explanation_from_wire(wire: admission_pb2.ExplainResponse) -> Explanation:
    """An explanation as it came."""
    return Explanation(
        wire.state,
        verdict_from_wire(wire.verdict),
        tuple(HopReport(hop.replica_id, verdict_from_wire(hop.verdict)) for hop in wire.hops),
        tuple(report_from_wire(stage) for stage in wire.stages),
        tuple(wire.why),
    )


def rejected_verdict(error: SloServeError) -> Verdict | None:
    """The verdict inside an error that rejected a request; None where it carries none."""
    for detail in error.details:
        verdict = types_pb2.Verdict()
        if isinstance(detail, any_pb2.Any) and detail.Unpack(verdict):
            return verdict_from_wire(verdict)
    return None
