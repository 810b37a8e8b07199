"""In which order replicas are asked about a request.

First the replica that holds the request's session (its KV is there), then those that share most of its prompt prefix,
then the fullest that may still take it: filling replicas one after the other keeps others free for what is hard to
place, and leaves idle ones to scale in. Replicas that obviously cannot take it come last, emptiest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PlacementRequest", "ReplicaLoad", "order_replicas"]


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """Load summary of a replica. `queued_prefill_s` is the predicted time to prefill all that waits there."""

    id: str
    running: int
    max_num_seqs: int
    used_blocks: int
    total_blocks: int
    block_size: int
    queued_prefill_s: float
    draining: bool = False

    @property
    def fullness(self) -> float:
        """How full the scarcer of memory and seats is, 0 to 1."""
        return max(self.used_blocks / max(1, self.total_blocks), self.running / max(1, self.max_num_seqs))


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What placement knows of a request. `cached_prefix_tokens` are per replica id, as far as known."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    session_replica: str | None = None
    cached_prefix_tokens: tuple[tuple[str, int], ...] = ()


def order_replicas(request: PlacementRequest, loads: Sequence[ReplicaLoad]) -> list[str]:
    """Replica ids in the order to ask; draining replicas are left out."""
    cached = dict(request.cached_prefix_tokens)

    def key(load: ReplicaLoad) -> tuple[bool, bool, int, float, str]:
        may_take = _may_take(request, load)
        prefix = cached.get(load.id, 0) if may_take else 0
        fullness = -load.fullness if may_take else load.fullness
        return (load.id != request.session_replica, not may_take, -prefix, fullness, load.id)

    return [load.id for load in sorted((load for load in loads if not load.draining), key=key)]


def _may_take(request: PlacementRequest, load: ReplicaLoad) -> bool:
    blocks = -(-(request.prompt_tokens + request.output_tokens) // load.block_size)
    return (
        load.running < load.max_num_seqs
        and load.used_blocks + blocks <= load.total_blocks
        and load.queued_prefill_s <= request.ttft_s
    )
