"""Workers as Redis knows them: leases, and claims in their name."""

from redis.asyncio import Redis

from protos import router_pb2
from services.common import keys
from services.common.registry import ReplicaRegistry
from services.common.request_store import RequestStore


async def lease(redis: Redis, replica_id: str, started_us: int, lease_s: float = 30.0) -> str:
    """Give a worker process its lease; its owner name."""
    replica = router_pb2.Replica(replica_id=replica_id, started_us=started_us, status=router_pb2.REPLICA_STATUS_READY)
    await ReplicaRegistry(redis).publish(replica, lease_s)
    return keys.owner_name(replica_id, started_us)


async def claim(store: RequestStore, request_id: str, attempt: int, owner: str) -> int | None:
    """Claim an attempt by the entry its request stands on now."""
    record = await store.get(request_id)
    stream, entry_id = (record.stream, record.entry_id) if record is not None else ("", "")
    return await store.claim(
        request_id, attempt, owner, stream=stream or keys.BEST_EFFORT_QUEUE, entry_id=entry_id or "0-1"
    )
