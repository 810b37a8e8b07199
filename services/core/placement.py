"""In which order replicas are asked about a request.

First the replica that holds the request's session, then those that hold most of its prompt in their prefix cache, then
the others by one of the orders below; last come those that obviously cannot take it, emptiest first.

An order is a pure function: load summaries and the number of this placement in, replica ids out. `fullest_first` is the
default: filling replicas one after the other keeps others free for what is hard to place, and leaves idle ones to scale
in. The rest are what other systems do, for comparison.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = [
    "Order",
    "OrderName",
    "PlacementRequest",
    "ReplicaLoad",
    "fullest_first",
    "least_loaded",
    "order_of",
    "order_replicas",
    "power_of_two",
    "round_robin",
    "within_budget",
]

_AFFINITY_SHARE = 0.5
"""A cached prefix of at least this share of the prompt comes before the load: less is not worth unbalancing for."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """Load summary of a replica.

    `queued_prefill_s` is the predicted time to prefill all that waits there, `prefill_s` that of the request at hand
    with nothing else to do (0: unknown). `declined`: it has just refused a request that was no harder than this one.
    """

    id: str
    running: int
    max_num_seqs: int
    used_blocks: int
    total_blocks: int
    block_size: int
    queued_prefill_s: float
    draining: bool = False
    prefill_s: float = 0.0
    declined: bool = False

    @property
    def fullness(self) -> float:
        """How full the scarcer of memory and seats is, 0 to 1."""
        return max(self.used_blocks / max(1, self.total_blocks), self.running / max(1, self.max_num_seqs))

    @property
    def load(self) -> tuple[float, float]:
        """Least is best: the backlog of prefill in seconds, then how full it is."""
        return (self.queued_prefill_s, self.fullness)


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What placement knows of a request. `cached_prefix_tokens` are by replica id, as far as known."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    session_replica: str | None = None
    cached_prefix_tokens: Mapping[str, int] = field(default_factory=dict)


Order = Callable[[Sequence[ReplicaLoad], int], list[str]]


def fullest_first(loads: Sequence[ReplicaLoad], turn: int = 0) -> list[str]:
    """The fullest first, so that work gathers on few replicas."""
    return [load.id for load in sorted(loads, key=lambda load: (-load.fullness, -load.queued_prefill_s, load.id))]


def least_loaded(loads: Sequence[ReplicaLoad], turn: int = 0) -> list[str]:
    """The shortest backlog first, the emptier one among equals."""
    return [load.id for load in sorted(loads, key=lambda load: (load.load, load.id))]


def round_robin(loads: Sequence[ReplicaLoad], turn: int) -> list[str]:
    """In turn by id, whatever the load."""
    ids = sorted(load.id for load in loads)
    first = turn % len(ids) if ids else 0
    return ids[first:] + ids[:first]


def power_of_two(loads: Sequence[ReplicaLoad], turn: int) -> list[str]:
    """Two at random, the less loaded of them first; after both the others in random order. `turn` seeds the draw."""
    drawn = sorted(loads, key=lambda load: load.id)
    random.Random(turn).shuffle(drawn)
    return [load.id for load in (*sorted(drawn[:2], key=lambda load: load.load), *drawn[2:])]


class OrderName(StrEnum):
    """The orders by the name of a setting."""

    FULLEST_FIRST = "fullest-first"
    LEAST_LOADED = "least-loaded"
    ROUND_ROBIN = "round-robin"
    POWER_OF_TWO = "power-of-two"


def order_of(name: OrderName) -> Order:
    """The order of that name."""
    orders: dict[OrderName, Order] = {
        OrderName.FULLEST_FIRST: fullest_first,
        OrderName.LEAST_LOADED: least_loaded,
        OrderName.ROUND_ROBIN: round_robin,
        OrderName.POWER_OF_TWO: power_of_two,
    }
    return orders[name]


def order_replicas(
    request: PlacementRequest, loads: Sequence[ReplicaLoad], order: Order = fullest_first, turn: int = 0
) -> list[str]:
    """Replica ids in the order to ask; draining replicas are left out. `turn` numbers the placements of a router."""
    alive = [load for load in loads if not load.draining]
    able = [load for load in alive if _may_take(request, load)]
    unable = [load for load in alive if not _may_take(request, load)]
    worth = max(1, int(request.prompt_tokens * _AFFINITY_SHARE))
    cached = {load.id: request.cached_prefix_tokens.get(load.id, 0) for load in able}

    def affinity(replica_id: str) -> int:
        tokens = cached.get(replica_id, 0)
        return -tokens if tokens >= worth else 0

    ordered = sorted(order(able, turn), key=affinity) + least_loaded(unable)
    return sorted(ordered, key=lambda replica_id: replica_id != request.session_replica)


def within_budget(order: Sequence[str], loads: Sequence[ReplicaLoad], budget: int) -> list[str]:
    """The first `budget` of an order, the last of them replaced by the least loaded of those that would be left out.

    Where the fullest are asked first, a budget would otherwise hide every replica that has room.
    """
    if len(order) <= budget:
        return list(order)
    asked = order[: budget - 1]
    rest = set(order[budget - 1 :])
    return [*asked, least_loaded([load for load in loads if load.id in rest])[0]]


def _may_take(request: PlacementRequest, load: ReplicaLoad) -> bool:
    blocks = -(-(request.prompt_tokens + request.output_tokens) // load.block_size)
    return (
        not load.declined
        and load.running < load.max_num_seqs
        and load.used_blocks + blocks <= load.total_blocks
        and load.queued_prefill_s + load.prefill_s <= request.ttft_s
    )
