"""The replicas as the router weighs them: who may take a request, and in which order they are asked."""

import asyncio
from collections.abc import Sequence

from redis.asyncio import Redis

from protos import router_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import FieldViolation, InvalidRequestError, SloServeError
from services.common.registry import FleetChange, ReplicaWatcher
from services.common.wire import perf_model_from_wire
from services.core.placement import PlacementRequest, ReplicaLoad, order_replicas

__all__ = ["Fleet"]


class Fleet:
    """Live replicas, and what this router has sent to each lately.

    A lease tells the load of a moment ago. The prefill that this router has queued since is added up here: it orders
    the replicas, while the planner alone decides.
    """

    def __init__(self, redis: Redis, clock: Clock) -> None:
        self._clock = clock
        self._watcher = ReplicaWatcher(redis, self._on_change)
        self._busy_until_s: dict[str, float] = {}
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
        """Ids of the replicas to ask, in order; empty where none is ready.

        `avoid` is asked last. Raises InvalidRequestError where the request is too long for every ready replica.
        """
        tokens = len(request.prompt_token_ids) + output_tokens
        ready = self.ready
        fitting = [replica for replica in ready if tokens <= _context(replica)]
        if ready and not fitting:
            longest = max(_context(replica) for replica in ready)
            text = f"{tokens} tokens with the output, but the replicas hold {longest} at most"
            raise InvalidRequestError(FieldViolation("request.prompt_token_ids", text))
        wanted = PlacementRequest(
            prompt_tokens=len(request.prompt_token_ids) + len(request.delivered_token_ids),
            output_tokens=output_tokens - len(request.delivered_token_ids),
            ttft_s=max(0.0, self._clock.to_monotonic_s(request.ttft_deadline_us) - self._clock.now_s()),
            session_replica=session_replica,
        )
        order = order_replicas(wanted, [self._load(replica) for replica in fitting])
        return sorted(order, key=lambda replica_id: replica_id == avoid)

    def placed(self, replica_id: str, prompt_tokens: int) -> None:
        """Take note of a prefill sent to a replica."""
        replica = self._watcher.replicas.get(replica_id)
        if replica is not None:
            begin_s = max(self._clock.now_s(), self._busy_until_s.get(replica_id, 0.0))
            self._busy_until_s[replica_id] = begin_s + _prefill_s(replica, prompt_tokens)

    def _load(self, replica: router_pb2.Replica) -> ReplicaLoad:
        return ReplicaLoad(
            id=replica.replica_id,
            running=replica.running + replica.waiting,
            max_num_seqs=replica.max_num_seqs,
            used_blocks=replica.total_blocks - replica.free_blocks,
            total_blocks=replica.total_blocks,
            block_size=max(1, replica.block_size),
            queued_prefill_s=max(0.0, self._busy_until_s.get(replica.replica_id, 0.0) - self._clock.now_s()),
        )

    def _on_change(self, change: FleetChange) -> None:
        for replica_id in change.left:
            self._busy_until_s.pop(replica_id, None)
        waiters, self._changed = self._changed, asyncio.Event()
        waiters.set()


def _context(replica: router_pb2.Replica) -> int:
    return min(replica.max_model_len, replica.total_blocks * replica.block_size)


def _prefill_s(replica: router_pb2.Replica, prompt_tokens: int) -> float:
    try:
        return perf_model_from_wire(replica.perf_model).zero_load_prefill_s(prompt_tokens)
    except SloServeError:  # a replica that has not measured itself yet
        return 0.0
