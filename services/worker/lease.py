"""This replica's lease in Redis: what the fleet knows about it, and the proof that it is alive.

Renewed six times per period, so that a lease which others cut short in doubt is renewed in time. A worker whose lease
ran out is dead to the fleet: its requests may run elsewhere by now. It stops claiming by its own clock, before it can
be told, and checks what it runs before it comes back, and once more after: until then anybody could take it away.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from redis.asyncio import Redis

from protos import router_pb2
from services.common import keys
from services.common.broker import command
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.registry import ReplicaRegistry

__all__ = ["Lease"]

_log = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 6
_STARTING_LEASES = 20  # an engine that loads its model keeps the event loop for seconds


class Lease:
    """Holds `slos:replica:{id}`. `on_lost` is awaited when the lease was found gone."""

    def __init__(
        self,
        redis: Redis,
        replica: router_pb2.Replica,
        clock: Clock,
        *,
        lease_s: float,
        load: Callable[[], Mapping[str, int]],
        on_lost: Callable[[], Awaitable[None]],
    ) -> None:
        """`load` gives the fields that change all the time: running, waiting, free_blocks, idle_ms, declined.

        `on_lost` is awaited twice: before the lease is taken again, and once it is.
        """
        self._redis = redis
        self._registry = ReplicaRegistry(redis)
        self._replica = replica
        self._clock = clock
        self._lease_s = lease_s
        self._load = load
        self._on_lost = on_lost
        self._renewed_at_s = -float("inf")
        self._stale_description = False
        self._unverified = False  # taken again, but what runs was not compared with Redis since

    @property
    def held(self) -> bool:
        """Whether the lease is certainly still ours, by this process's own clock."""
        return self._clock.now_s() - self._renewed_at_s < self._duration_s

    @property
    def _duration_s(self) -> float:
        starting = self._replica.status == router_pb2.REPLICA_STATUS_STARTING
        return self._lease_s * (_STARTING_LEASES if starting else 1)

    async def publish(self, status: router_pb2.ReplicaStatus.ValueType) -> None:
        """Describe the replica with this status and take the lease. Raises SloServeError while Redis is away."""
        self._replica.status = status
        await self._publish()

    def describe(self, changed: router_pb2.Replica) -> None:
        """Fields of the description that changed; written with the next renewal."""
        if changed.HasField("perf_model"):
            self._replica.ClearField("perf_model")
        self._replica.MergeFrom(changed)
        self._stale_description = True

    async def run(self) -> None:
        """Renew until cancelled. Raises SloServeError REPLICA_UNKNOWN where a newer process has this replica's name."""
        while True:
            await asyncio.sleep(self._lease_s / _RENEWALS_PER_LEASE)
            try:
                await self._renew()
            except SloServeError as error:
                if error.reason is not Reason.BROKER_UNAVAILABLE:
                    raise
                _log.warning("the lease cannot be renewed: %s", error)

    async def remove(self) -> None:
        """Give the lease up: the fleet sees the replica leave at once."""
        self._renewed_at_s = -float("inf")
        await self._registry.remove(self._replica.replica_id, self._replica.started_us)

    async def _renew(self) -> None:
        asked_at_s = self._clock.now_s()
        if await self._registry.renew(
            self._replica.replica_id, self._replica.started_us, self._duration_s, **self._load()
        ):
            self._renewed_at_s = asked_at_s
            if self._unverified:
                await self._verify()
            if self._stale_description:
                await self._publish()
            return
        self._renewed_at_s = -float("inf")
        await self._refuse_if_taken()
        _log.warning("the lease of %s ran out; checking what still is ours", self._replica.replica_id)
        await self._on_lost()
        self._unverified = True
        await self._publish()
        await self._verify()

    async def _verify(self) -> None:
        await self._on_lost()
        self._unverified = False

    async def _publish(self) -> None:
        asked_at_s = self._clock.now_s()
        self._stale_description = False
        for name, value in self._load().items():
            setattr(self._replica, name, value)
        await self._registry.publish(self._replica, self._duration_s)
        self._renewed_at_s = asked_at_s

    async def _refuse_if_taken(self) -> None:
        raw = await command(self._redis, "HGET", keys.replica_key(self._replica.replica_id), "started_us")
        if raw is not None and int(raw) > self._replica.started_us:
            raise SloServeError(
                Reason.REPLICA_UNKNOWN, f"another worker has taken the name {self._replica.replica_id!r}: stopping"
            )
