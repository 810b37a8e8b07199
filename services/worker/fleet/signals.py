"""What a fleet is scaled by, read from Redis: leases of its replicas, totals of all routers, the shared queue."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from redis.asyncio import Redis

from protos import router_pb2
from services.common.broker import command
from services.common.clock import Clock
from services.common.keys import BEST_EFFORT_QUEUE, GROUP, PLACEMENTS
from services.common.registry import ReplicaWatcher
from services.core.scaling import FleetSample

__all__ = ["Look", "Signals"]


@dataclass(frozen=True, slots=True)
class Look:
    """The fleet now: its leases by replica id, and the sample to scale by."""

    replicas: Mapping[str, router_pb2.Replica]
    sample: FleetSample

    def ready(self, replica_id: str) -> bool:
        """Whether a replica serves."""
        replica = self.replicas.get(replica_id)
        return replica is not None and replica.status == router_pb2.REPLICA_STATUS_READY


class Signals:
    """Turns running totals into differences between two looks."""

    def __init__(self, redis: Redis, clock: Clock) -> None:
        self._redis = redis
        self._clock = clock
        self._watcher = ReplicaWatcher(redis)
        self._at_s: float | None = None
        self._placements: dict[str, int] = {}
        self._leases: dict[str, router_pb2.Replica] = {}

    async def look(self, present: Collection[str]) -> Look:
        """The state of the replicas `present`. Raises SloServeError while Redis is away."""
        await self._watcher.refresh()
        raw = await command(self._redis, "HGETALL", PLACEMENTS)
        placements = {name.decode(): int(value) for name, value in raw.items()}
        waiting = await self._waiting()
        now_s = self._clock.now_s()
        leases = {name: replica for name, replica in self._watcher.replicas.items() if name in present}
        ready = [replica for replica in leases.values() if replica.status == router_pb2.REPLICA_STATUS_READY]
        sample = FleetSample(
            at_s=now_s,
            ready=len(ready),
            starting=len(present) - len(ready),
            offered=self._more(placements, "offered"),
            declined=self._more(placements, "declined") + sum(self._declined(replica) for replica in ready),
            idle=sum(self._idle_share(replica, now_s) for replica in ready),
            waiting=waiting,
        )
        self._at_s, self._placements, self._leases = now_s, placements, leases
        return Look(leases, sample)

    async def _waiting(self) -> int:
        length = int(await command(self._redis, "XLEN", BEST_EFFORT_QUEUE))
        if not length:
            return 0
        groups = await command(self._redis, "XINFO", "GROUPS", BEST_EFFORT_QUEUE)
        pending = sum(int(group["pending"]) for group in groups if group["name"] in (GROUP, GROUP.encode()))
        return max(0, length - pending)

    def _more(self, placements: Mapping[str, int], name: str) -> int:
        if self._at_s is None:  # totals of before this process do not count
            return 0
        return max(0, placements.get(name, 0) - self._placements.get(name, 0))

    def _before(self, replica: router_pb2.Replica) -> router_pb2.Replica | None:
        before = self._leases.get(replica.replica_id)
        return before if before is not None and before.started_us == replica.started_us else None

    def _declined(self, replica: router_pb2.Replica) -> int:
        before = self._before(replica)
        return 0 if before is None else replica.declined - before.declined

    def _idle_share(self, replica: router_pb2.Replica, now_s: float) -> float:
        """Share of the time since the last look in which it had nothing to do; a lease is up to a second old."""
        before = self._before(replica)
        if before is None or self._at_s is None or now_s <= self._at_s:
            return 0.0
        return min(2.0, (replica.idle_ms - before.idle_ms) / 1000 / (now_s - self._at_s))
