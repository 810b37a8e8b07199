"""From a decision of the core to the verdict a client reads."""

import math
from collections.abc import Sequence

from protos import types_pb2
from services.common.clock import Clock
from services.common.wire import constraint_to_wire, tier_name
from services.core.admission import Decision
from services.core.slo import BEST_EFFORT, Tier
from services.core.verdict import VerdictKind
from services.planner.candidates import Candidate

__all__ = ["add_batch_ahead", "no_state_verdict", "verdict_of"]

_KINDS = {
    VerdictKind.PENDING: types_pb2.VERDICT_KIND_PENDING,
    VerdictKind.ADMITTED: types_pb2.VERDICT_KIND_ADMITTED,
}


def verdict_of(
    candidate: Candidate,
    decision: Decision,
    kind: VerdictKind,
    *,
    replica_id: str,
    tiers: Sequence[Tier],
    clock: Clock,
) -> types_pb2.Verdict:
    """The verdict on a candidate. Predictions the core does not have (it never finishes) are 0.

    A PENDING one has a constraint only where the plan does not hold the request for now, or may be a batch off.
    """
    verdict = _about(candidate, clock)
    verdict.predicted_ttft_ms = _ms(decision.predicted_ttft_s)
    verdict.predicted_tpot_ms = _ms(decision.predicted_tpot_s)
    if kind is not VerdictKind.DECLINED:
        verdict.kind = _KINDS[kind]
        verdict.replica_id = replica_id
        verdict.tier = tier_name(candidate.prefill.tier, tiers)
    if not decision.admitted:
        verdict.constraint.CopyFrom(constraint_to_wire(decision.constraint, tiers))
    return verdict


def add_batch_ahead(verdict: types_pb2.Verdict, batch_s: float, spare_s: float) -> None:
    """Say why a request that the plan holds is not promised yet: one more batch may run before it."""
    verdict.constraint.kind = types_pb2.CONSTRAINT_KIND_BATCH_AHEAD
    verdict.constraint.needed, verdict.constraint.available = _ms(batch_s), _ms(spare_s)
    verdict.constraint.detail = (
        f"one more batch of {_ms(batch_s):.1f} ms may run first, the plan leaves {_ms(spare_s):.1f} ms to spare"
    )


def no_state_verdict(candidate: Candidate, why: str, clock: Clock) -> types_pb2.Verdict:
    """Best effort, because nothing can be promised about a replica that does not report."""
    verdict = _about(candidate, clock)
    verdict.constraint.kind = types_pb2.CONSTRAINT_KIND_NO_STATE
    verdict.constraint.detail = why
    return verdict


def _about(candidate: Candidate, clock: Clock) -> types_pb2.Verdict:
    return types_pb2.Verdict(
        kind=types_pb2.VERDICT_KIND_BEST_EFFORT,
        tier=BEST_EFFORT,
        ttft_slo_ms=candidate.slo.ttft_s * 1000 if candidate.slo.ttft_s is not None else 0.0,
        tpot_slo_ms=candidate.slo.tpot_s * 1000,
        decided_at_us=clock.now_us(),
    )


def _ms(seconds: float) -> float:
    return seconds * 1000 if math.isfinite(seconds) else 0.0
