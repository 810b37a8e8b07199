import asyncio

import pytest
from redis.asyncio import Redis

from protos import router_pb2, types_pb2
from services.common import keys
from services.common.kept import KeptTasks
from services.common.registry import FleetChange, ReplicaRegistry, ReplicaWatcher


def replica(replica_id: str, started_us: int = 1) -> router_pb2.Replica:
    return router_pb2.Replica(
        replica_id=replica_id,
        address="127.0.0.1:50061",
        model="tiny",
        engine="emulated",
        status=router_pb2.REPLICA_STATUS_READY,
        perf_model=types_pb2.PerfModel(
            segments=[types_pb2.PerfSegment(k_tok=6.88e-5, b=0.0248), types_pb2.PerfSegment(b=0.03)],
            margin_s=0.002,
            r2=0.97,
        ),
        total_blocks=1000,
        block_size=16,
        max_num_seqs=64,
        max_model_len=2048,
        planner="127.0.0.1:50053",
        started_us=started_us,
        free_blocks=900,
        roles=["prefill", "decode"],
    )


class Changes:
    """What a watcher reported, awaitable."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[FleetChange] = asyncio.Queue()

    def __call__(self, change: FleetChange) -> None:
        self._queue.put_nowait(change)

    async def next(self) -> FleetChange:
        return await asyncio.wait_for(self._queue.get(), 5)

    @property
    def empty(self) -> bool:
        return self._queue.empty()


async def test_a_replica_comes_back_as_it_was_published(broker: Redis) -> None:
    await ReplicaRegistry(broker).publish(replica("w0"), 5.0)
    watcher = ReplicaWatcher(broker)
    await watcher.refresh()
    assert watcher.replicas == {"w0": replica("w0")}
    fields = await broker.hgetall(keys.replica_key("w0"))
    assert fields[b"status"] == b"READY"
    assert fields[b"max_num_seqs"] == b"64"
    assert fields[b"perf_model"].startswith(b"{")
    assert 0 < await broker.pttl(keys.replica_key("w0")) <= 5000


async def test_a_lease_that_is_not_renewed_shows_as_a_leave(broker: Redis) -> None:
    registry, changes = ReplicaRegistry(broker), Changes()
    watcher = ReplicaWatcher(broker, changes, poll_s=0.02)
    await watcher.start()
    await registry.publish(replica("w0"), 0.15)
    assert await changes.next() == FleetChange(frozenset({"w0"}), frozenset(), frozenset())
    assert await changes.next() == FleetChange(frozenset(), frozenset({"w0"}), frozenset())
    assert watcher.replicas == {}
    assert not await registry.renew("w0", 1, 5.0)
    assert await broker.smembers(keys.REPLICA_INDEX) == set()
    await watcher.stop()


async def test_renewing_prolongs_the_lease_and_carries_the_load(broker: Redis) -> None:
    registry, changes = ReplicaRegistry(broker), Changes()
    await registry.publish(replica("w0"), 1.0)
    watcher = ReplicaWatcher(broker, changes)
    await watcher.refresh()
    await changes.next()
    assert await registry.renew("w0", 1, 60.0, running=3, free_blocks=700, status="DRAINING")
    assert await broker.pttl(keys.replica_key("w0")) > 10_000
    await watcher.refresh()
    assert await changes.next() == FleetChange(frozenset(), frozenset(), frozenset({"w0"}))
    seen = watcher.replicas["w0"]
    assert (seen.running, seen.free_blocks, seen.status) == (3, 700, router_pb2.REPLICA_STATUS_DRAINING)
    await watcher.refresh()
    assert changes.empty


async def test_a_restarted_replica_has_gone_and_come_and_its_old_process_loses_the_lease(broker: Redis) -> None:
    registry, changes = ReplicaRegistry(broker), Changes()
    await registry.publish(replica("w0", 1), 5.0)
    watcher = ReplicaWatcher(broker, changes)
    await watcher.refresh()
    await changes.next()
    await registry.publish(replica("w0", 2), 5.0)
    await watcher.refresh()
    assert await changes.next() == FleetChange(frozenset({"w0"}), frozenset({"w0"}), frozenset())
    assert not await registry.renew("w0", 1, 5.0)
    await registry.remove("w0", 1)
    assert await broker.exists(keys.replica_key("w0")) == 1
    await registry.remove("w0", 2)
    assert await broker.exists(keys.replica_key("w0")) == 0


async def test_an_unreadable_description_hides_one_replica_only(
    broker: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await ReplicaRegistry(broker).publish(replica("good"), 5.0)
    await broker.hset(keys.replica_key("bad"), mapping={"status": "READY", "started_us": "soon"})
    await broker.sadd(keys.REPLICA_INDEX, "bad")
    watcher = ReplicaWatcher(broker)
    await watcher.refresh()
    assert list(watcher.replicas) == ["good"]
    assert "bad" in caplog.text


async def test_a_change_that_its_listener_failed_at_is_told_again(
    broker: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    changes, failed = Changes(), list[str]()

    def listen(change: FleetChange) -> None:
        if not failed:
            raise ValueError("a bug")
        changes(change)

    tasks = KeptTasks(failed.append, again_s=0.0)
    watcher = ReplicaWatcher(broker, listen, poll_s=0.0, tasks=tasks)
    await watcher.start()
    await ReplicaRegistry(broker).publish(replica("w0"), 60.0)
    assert await changes.next() == FleetChange(frozenset({"w0"}), frozenset(), frozenset())
    await watcher.stop()
    assert failed == ["ReplicaWatcher._poll"]
    assert "a bug" in caplog.text
