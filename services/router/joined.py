"""The answer for a request that somebody has placed already."""

from protos import router_pb2, types_pb2
from services.common.request_record import RequestRecord
from services.core.slo import BEST_EFFORT

__all__ = ["joined"]

_KINDS = {"admitted": types_pb2.VERDICT_KIND_ADMITTED, "pending": types_pb2.VERDICT_KIND_PENDING}


def joined(record: RequestRecord, stage: types_pb2.Stage, now_us: int) -> router_pb2.PlaceResponse:
    """The placement in force, as far as Redis tells it: predictions are not kept."""
    kind = _KINDS.get(record.verdict, types_pb2.VERDICT_KIND_BEST_EFFORT)
    on_tier = kind != types_pb2.VERDICT_KIND_BEST_EFFORT
    verdict = types_pb2.Verdict(
        kind=kind,
        replica_id=record.replica_id if on_tier else "",
        tier=record.tier if on_tier else BEST_EFFORT,
        ttft_slo_ms=stage.ttft_ms,
        tpot_slo_ms=stage.tpot_ms,
        decided_at_us=now_us,
        hops=int(record.fields.get("hops", "0")),
    )
    return router_pb2.PlaceResponse(
        verdict=verdict,
        replica_id=record.replica_id,
        stream=record.stream,
        entry_id=record.entry_id,
        attempt=record.attempt,
    )
