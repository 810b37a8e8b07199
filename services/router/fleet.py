"""The replicas as the router weighs them: who may take a request, and in which order they are asked."""

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from protos import router_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import FieldViolation, InvalidRequestError, SloServeError
from services.common.registry import FleetChange, ReplicaWatcher
from services.common.wire import perf_model_from_wire
from services.core.perf_model import PerfModel
from services.core.placement import (
    Order,
    PlacementRequest,
    ReplicaLoad,
    fullest_first,
    order_replicas,
    within_budget,
)
from services.core.prefixes import PrefixMemory

__all__ = ["Fleet"]

_DECLINE_HOLDS_S = 0.1
"""So long a replica that declined is asked after the others about what is no easier; by then it has moved on."""

_NO_EASIER = 1.1  # times the TTFT that was left when it declined


@dataclass(frozen=True, slots=True)
class _Declined:
    at_s: float
    prompt_tokens: int
    ttft_s: float


class Fleet:
    """Live replicas, and what this router has sent to each lately.

    A lease tells the load of a moment ago. What this router knows beyond it, the prefill it has queued since, the
    prompts it has sent and who has just declined, orders the replicas; the planner alone decides. Another router knows
    other things and may ask in another order: nothing depends on that.
    """

    def __init__(self, redis: Redis, clock: Clock, order: Order = fullest_first) -> None:
        self._clock = clock
        self._order = order
        self._turn = 0
        self._watcher = ReplicaWatcher(redis, self._on_change)
        self._models: dict[str, PerfModel] = {}
        self._prefixes = PrefixMemory()
        self._busy_until_s: dict[str, float] = {}
        self._declined: dict[str, _Declined] = {}
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Read the fleet once and keep watching it."""
        await self._watcher.start()

    async def stop(self) -> None:
        """Stop watching."""
        await self._watcher.stop()

    async def refresh(self) -> None:
        """Read the fleet now."""
        await self._watcher.refresh()

    @property
    def replicas(self) -> Sequence[router_pb2.Replica]:
        """All live replicas, by id."""
        return [replica for _, replica in sorted(self._watcher.replicas.items())]

    @property
    def ready(self) -> Sequence[router_pb2.Replica]:
        """Those that take requests."""
        return [replica for replica in self.replicas if replica.status == router_pb2.REPLICA_STATUS_READY]

    async def wait_for_change(self, timeout_s: float) -> bool:
        """Return when a replica comes, goes or reports another load; False after `timeout_s` without that."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def order(
        self,
        request: types_pb2.QueuedRequest,
        output_tokens: int,
        *,
        session_replica: str | None = None,
        avoid: str | None = None,
    ) -> list[str]:
        """Ids of the replicas that could take a request, in order; empty where none is ready.

        `avoid` is asked last. Raises InvalidRequestError where the request is too long for every ready replica.
        """
        tokens = len(request.prompt_token_ids) + output_tokens
        ready = self.ready
        fitting = [replica for replica in ready if tokens <= _context(replica)]
        if ready and not fitting:
            longest = max(_context(replica) for replica in ready)
            text = f"{tokens} tokens with the output, but the replicas hold {longest} at most"
            raise InvalidRequestError(FieldViolation("request.prompt_token_ids", text))
        self._turn += 1
        wanted = PlacementRequest(
            prompt_tokens=_to_prefill(request),
            output_tokens=output_tokens - len(request.delivered_token_ids),
            ttft_s=self._ttft_s(request),
            session_replica=session_replica,
            cached_prefix_tokens=self._prefixes.cached_tokens(
                _prompt(request), [replica.replica_id for replica in fitting]
            ),
        )
        order = order_replicas(wanted, self._loads(request, fitting), self._order, self._turn)
        return sorted(order, key=lambda replica_id: replica_id == avoid)

    def shortlist(self, order: Sequence[str], request: types_pb2.QueuedRequest, budget: int) -> list[str]:
        """Whom to ask in one round: the first of an order, and with the last question the least loaded of the rest."""
        if len(order) <= budget:
            return list(order)
        behind = set(order[budget - 1 :])
        rest = [replica for replica_id, replica in self._watcher.replicas.items() if replica_id in behind]
        return within_budget(order, self._loads(request, rest), budget)

    def alone_s(self, replica_ids: Sequence[str], request: types_pb2.QueuedRequest) -> float:
        """The prefill of a request on the fastest of some replicas, were it idle; 0 where none has measured itself."""
        tokens = _to_prefill(request)
        return min((self._prefill_s(replica_id, tokens) for replica_id in replica_ids), default=0.0)

    def placed(self, replica_id: str, request: types_pb2.QueuedRequest) -> None:
        """Take note of a request sent to a replica."""
        replica = self._watcher.replicas.get(replica_id)
        if replica is None:
            return
        self._prefixes.sent(replica_id, _prompt(request), replica.total_blocks * replica.block_size)
        begin_s = max(self._clock.now_s(), self._busy_until_s.get(replica_id, 0.0))
        self._busy_until_s[replica_id] = begin_s + self._prefill_s(replica_id, _to_prefill(request))

    def declined(self, replica_id: str, request: types_pb2.QueuedRequest) -> None:
        """Take note of a replica that has no room for a request now."""
        self._declined[replica_id] = _Declined(self._clock.now_s(), _to_prefill(request), self._ttft_s(request))

    def _loads(self, request: types_pb2.QueuedRequest, replicas: Sequence[router_pb2.Replica]) -> list[ReplicaLoad]:
        now_s, ttft_s, tokens = self._clock.now_s(), self._ttft_s(request), _to_prefill(request)
        by_model = {model: model.zero_load_prefill_s(tokens) for model in set(self._models.values())}
        times = {replica_id: by_model[model] for replica_id, model in self._models.items()}

        def refused(replica_id: str) -> bool:
            last = self._declined.get(replica_id)
            recent = last is not None and now_s - last.at_s < _DECLINE_HOLDS_S
            return last is not None and recent and tokens >= last.prompt_tokens and ttft_s <= _NO_EASIER * last.ttft_s

        return [
            ReplicaLoad(
                id=replica.replica_id,
                running=replica.running + replica.waiting,
                max_num_seqs=replica.max_num_seqs,
                used_blocks=replica.total_blocks - replica.free_blocks,
                total_blocks=replica.total_blocks,
                block_size=max(1, replica.block_size),
                queued_prefill_s=max(0.0, self._busy_until_s.get(replica.replica_id, 0.0) - now_s),
                prefill_s=times.get(replica.replica_id, 0.0),
                declined=refused(replica.replica_id),
            )
            for replica in replicas
        ]

    def _ttft_s(self, request: types_pb2.QueuedRequest) -> float:
        return max(0.0, self._clock.to_monotonic_s(request.ttft_deadline_us) - self._clock.now_s())

    def _prefill_s(self, replica_id: str, prompt_tokens: int) -> float:
        model = self._models.get(replica_id)
        return model.zero_load_prefill_s(prompt_tokens) if model is not None else 0.0

    def _on_change(self, change: FleetChange) -> None:
        for replica_id in change.left:
            for known in (self._busy_until_s, self._declined, self._models):
                known.pop(replica_id, None)
            self._prefixes.forget(replica_id)
        for replica_id in change.joined | change.changed:
            self._learn_model(replica_id)
        waiters, self._changed = self._changed, asyncio.Event()
        waiters.set()

    def _learn_model(self, replica_id: str) -> None:
        replica = self._watcher.replicas.get(replica_id)
        if replica is None:
            return
        try:
            self._models[replica_id] = perf_model_from_wire(replica.perf_model)
        except SloServeError:  # it has not measured itself yet
            self._models.pop(replica_id, None)


def _context(replica: router_pb2.Replica) -> int:
    return min(replica.max_model_len, replica.total_blocks * replica.block_size)


def _to_prefill(request: types_pb2.QueuedRequest) -> int:
    return len(request.prompt_token_ids) + len(request.delivered_token_ids)


def _prompt(request: types_pb2.QueuedRequest) -> "array[int]":
    prompt = array("I", request.prompt_token_ids)
    prompt.extend(request.delivered_token_ids)
    return prompt
