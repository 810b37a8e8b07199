"""From the hook's decision on a pending request to the verdict its client reads."""

import math
from collections.abc import Sequence
from dataclasses import replace

from protos import types_pb2
from services.common.wire import constraint_to_wire, tier_index
from services.core.slo import BEST_EFFORT, Tier
from services.worker.engine_api import RequestDecision

__all__ = ["decision_verdict"]


def decision_verdict(
    decision: RequestDecision,
    request: types_pb2.QueuedRequest,
    *,
    replica_id: str,
    tiers: Sequence[Tier],
    now_us: int,
) -> types_pb2.Verdict:
    """A promise on the request's tier, or best effort with the constraint that stood in the way."""
    verdict = types_pb2.Verdict(
        kind=types_pb2.VERDICT_KIND_ADMITTED if decision.admitted else types_pb2.VERDICT_KIND_BEST_EFFORT,
        replica_id=replica_id,
        tier=request.tier if decision.admitted else BEST_EFFORT,
        predicted_ttft_ms=_ms(decision.predicted_ttft_s),
        predicted_tpot_ms=_ms(decision.predicted_tpot_s),
        ttft_slo_ms=request.stages[0].ttft_ms,
        tpot_slo_ms=request.stages[0].tpot_ms,
        decided_at_us=now_us,
        retry_after_ms=_ms(decision.retry_after_s),
    )
    if not decision.admitted:
        tier = tier_index(decision.tier, tiers) if decision.tier else -1
        # The hook numbers tiers in its own way; the sentence is made with the catalogue's numbers.
        verdict.constraint.CopyFrom(constraint_to_wire(replace(decision.constraint, tier=tier), tiers))
    return verdict


def _ms(seconds: float) -> float:
    return seconds * 1000 if math.isfinite(seconds) else 0.0
