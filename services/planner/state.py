"""A worker's ReplicaState, checked once and turned into core values.

Nothing here touches a ledger: a message that cannot be true raises `SloServeError` (STATE_INVALID) and changes nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from protos import planner_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.wire import drafts_from_wire, engine_request_from_wire, perf_model_from_wire
from services.core.perf_model import PerfModel
from services.core.slo import Tier
from services.core.speculation import Drafts
from services.core.view import Decoder, Prefill

__all__ = ["Capacity", "EngineEntry", "StateUpdate", "parse_state"]

_MAX_AWAY_S = 86_400.0
_MAX_SKEW_S = 60.0
_MAX_BATCH_S = 600.0


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """One request in the engine. `asked_tpot_s` and `ttft_deadline_s` are what a best-effort request once asked for.

    `accepted_s`: when its worker handed it to the engine; NaN where that is not known.
    """

    attempt: int
    planned: Decoder | Prefill
    asked_tpot_s: float
    ttft_deadline_s: float
    max_tokens: int
    accepted_s: float = math.nan
    application: str = ""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine has, and when it was looked at (monotonic seconds of this process)."""

    free_blocks: int
    total_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int
    observed_s: float
    engine_free_s: float
    max_batch_tokens: int = 0  # 0: unknown
    batches_in_flight: int = 1


@dataclass(frozen=True, slots=True)
class StateUpdate:
    """A checked ReplicaState. `perf_model` and `drafts` are None where the message leaves them as they were.

    `removed_ids` are the requests that left the engine, those it finished included.
    """

    seq: int
    full: bool
    entries: dict[str, EngineEntry]
    removed_ids: frozenset[str]
    capacity: Capacity
    perf_model: PerfModel | None
    drafts: Drafts | None = None


def parse_state(wire: planner_pb2.ReplicaState, *, tiers: Sequence[Tier], clock: Clock) -> StateUpdate:
    """Check one message of an Observe stream."""
    entries: dict[str, EngineEntry] = {}
    for request in wire.requests:
        if not request.request_id or request.request_id in entries:
            raise _invalid(wire, f"request id {request.request_id!r} is empty or listed twice")
        entries[request.request_id] = _entry(request, wire, tiers=tiers, clock=clock)
    removed = (*wire.removed_ids, *(end.request_id for end in wire.finished if end.request_id not in entries))
    both = entries.keys() & set(wire.removed_ids)
    if both:
        raise _invalid(wire, f"request {min(both)} is listed and removed at once")
    perf_model = perf_model_from_wire(wire.perf_model) if wire.HasField("perf_model") else None
    if wire.full and perf_model is None:
        raise _invalid(wire, "a full state carries the performance model")
    drafts = drafts_from_wire(wire.drafts) if wire.HasField("drafts") else Drafts() if wire.full else None
    return StateUpdate(wire.seq, wire.full, entries, frozenset(removed), _capacity(wire, clock), perf_model, drafts)


def _invalid(wire: planner_pb2.ReplicaState, text: str) -> SloServeError:
    return SloServeError(Reason.STATE_INVALID, f"state {wire.seq} of replica {wire.replica_id}: {text}")


def _capacity(wire: planner_pb2.ReplicaState, clock: Clock) -> Capacity:
    if wire.block_size < 1 or wire.total_blocks < 1 or wire.free_blocks > wire.total_blocks:
        raise _invalid(wire, f"{wire.free_blocks} of {wire.total_blocks} blocks of {wire.block_size} tokens free")
    if wire.max_num_seqs < 1:
        raise _invalid(wire, "max_num_seqs is 0")
    now_s = clock.now_s()
    observed_s = clock.to_monotonic_s(wire.observed_at_us)
    if wire.observed_at_us <= 0 or observed_s > now_s + _MAX_SKEW_S:  # an idle engine may have reported long ago
        raise _invalid(wire, f"observed_at_us {wire.observed_at_us} is not in the past")
    engine_free_s = clock.to_monotonic_s(wire.engine_free_at_us) if wire.engine_free_at_us else -math.inf
    if engine_free_s > now_s + _MAX_BATCH_S:
        raise _invalid(wire, f"engine_free_at_us {wire.engine_free_at_us}: no batch lasts that long")
    return Capacity(
        wire.free_blocks, wire.total_blocks, wire.block_size, wire.max_num_seqs, wire.max_model_len, observed_s,
        engine_free_s, wire.max_batch_tokens, max(1, wire.batches_in_flight),
    )  # fmt: skip


def _entry(
    request: planner_pb2.EngineRequest,
    wire: planner_pb2.ReplicaState,
    *,
    tiers: Sequence[Tier],
    clock: Clock,
) -> EngineEntry:
    planned = engine_request_from_wire(request, tiers, clock)
    if planned.tier >= 0:
        due_s = planned.next_deadline_s if isinstance(planned, Decoder) else planned.deadline_s
        if abs(due_s - clock.now_s()) > _MAX_AWAY_S:
            raise _invalid(wire, f"request {request.request_id}: its deadline is more than a day from now")
    tpot_s = request.tpot_ms / 1000
    return EngineEntry(
        attempt=request.attempt,
        planned=planned,
        asked_tpot_s=tpot_s if math.isfinite(tpot_s) and tpot_s > 0 else math.inf,
        ttft_deadline_s=clock.to_monotonic_s(request.ttft_deadline_us) if request.ttft_deadline_us else -math.inf,
        max_tokens=request.max_tokens,
        accepted_s=clock.to_monotonic_s(request.accepted_at_us) if request.accepted_at_us else math.nan,
        application=request.application,
    )
