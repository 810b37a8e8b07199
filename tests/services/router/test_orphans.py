"""Requests that have lost their worker, their admission process, or both."""

import pytest

from services.common import keys
from services.common.clock import Clock
from services.common.orphans import ExpiringLock, OrphanFinder
from services.common.request_record import RequestState
from services.router.orphans import Orphanage
from services.router.rescue import Rescuer
from tests.services.owners import claim, lease
from tests.services.router.world import World

FORGOTTEN_S = 60.0


class Sweep:
    """An orphanage whose rounds and clock are moved by hand."""

    def __init__(self, world: World) -> None:
        self.now_s = 1000.0
        self._orphanage = Orphanage(
            finder=OrphanFinder(world.redis),
            lock=ExpiringLock(world.redis, keys.ORPHAN_LOCK, "router-a", 5.0),
            store=world.store,
            rescuer=Rescuer(
                store=world.store, fleet=world.parts.fleet, placer=world.parts.placer, clock=world.clock, max_losses=3
            ),
            clock=Clock(lambda: self.now_s),
            forgotten_s=FORGOTTEN_S,
        )

    async def after(self, seconds: float) -> None:
        for _ in range(10):  # rounds in between, as in life
            self.now_s += seconds / 10
            await self._orphanage.round()


@pytest.fixture
async def sweep(world: World) -> Sweep:
    sweep = Sweep(world)
    await sweep.after(1.0)
    return sweep


async def taken_by(world: World, replica_id: str, grace_s: float = 0.0) -> None:
    """Request r, running on a replica."""
    await world.replica(replica_id)
    world.planner.admit(replica_id)
    request = world.request("r")
    request.resume_grace_us = round(grace_s * 1e6)
    await world.place(request)
    assert await claim(world.store, "r", 1, keys.owner_name(replica_id, 1)) == 1
    assert await world.store.mark("r", 1, keys.owner_name(replica_id, 1))


async def state(world: World) -> tuple[RequestState, int]:
    record = await world.store.get("r")
    assert record is not None
    return record.state, record.attempt


async def admission_lives(world: World) -> None:
    await world.redis.set(keys.admission_key("adm-1"), "1")


async def test_with_worker_and_admission_dead_a_request_with_a_grace_runs_on_elsewhere(
    world: World, sweep: Sweep
) -> None:
    await taken_by(world, "a", grace_s=30)
    await world.lose("a")
    await world.replica("b")
    world.planner.admit("b")
    await sweep.after(2.0)
    assert await state(world) == (RequestState.RUNNING, 1)  # Redis may only just be back, and everybody with it
    await sweep.after(2.0)
    assert await state(world) == (RequestState.QUEUED, 2)
    record = await world.store.get("r")
    assert record is not None
    assert record.replica_id == "b"


async def test_nobody_comes_back_for_it_and_it_is_cancelled_with_its_entry(world: World, sweep: Sweep) -> None:
    await taken_by(world, "a", grace_s=30)
    await world.lose("a")  # and no other replica is there
    await sweep.after(32.0)
    assert (await state(world))[0] is RequestState.RUNNING
    await sweep.after(5.0)
    assert (await state(world))[0] is RequestState.CANCELLED
    assert await world.redis.xlen(keys.queue_key("a", "tight")) == 0


async def test_without_a_grace_a_lost_admission_process_is_a_lost_client(world: World, sweep: Sweep) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    await world.place(world.request("r"))  # waits in the shared queue
    await sweep.after(2.0)
    assert (await state(world))[0] is RequestState.QUEUED
    await sweep.after(3.0)
    assert (await state(world))[0] is RequestState.CANCELLED
    assert await world.redis.xlen(keys.BEST_EFFORT_QUEUE) == 0


async def test_what_a_live_worker_runs_is_its_own_to_end(world: World, sweep: Sweep) -> None:
    await taken_by(world, "a")
    await sweep.after(100.0)
    assert await state(world) == (RequestState.RUNNING, 1)


async def test_a_live_admission_process_rescues_for_itself_unless_it_has_forgotten(world: World, sweep: Sweep) -> None:
    await admission_lives(world)
    await taken_by(world, "a")
    await world.lose("a")
    await world.replica("b")
    await sweep.after(FORGOTTEN_S - 1)
    assert await state(world) == (RequestState.RUNNING, 1)
    await sweep.after(10.0)
    assert (await state(world))[0] is RequestState.CANCELLED


async def test_losses_long_apart_do_not_add_up(world: World, sweep: Sweep) -> None:
    await admission_lives(world)
    await taken_by(world, "a")
    await world.lose("a")
    await sweep.after(FORGOTTEN_S - 10)
    await lease(world.redis, "a", 1)  # it was only away
    await sweep.after(30.0)
    await world.lose("a")
    await sweep.after(FORGOTTEN_S - 10)
    assert await state(world) == (RequestState.RUNNING, 1)


async def test_entries_no_request_stands_on_are_removed_and_so_are_the_queues_of_gone_replicas(
    world: World, sweep: Sweep
) -> None:
    await admission_lives(world)
    await taken_by(world, "a")
    await world.redis.delete(keys.request_key("r"))
    stream = keys.queue_key("a", "tight")
    assert await world.redis.xlen(stream) == 1
    await sweep.after(1.0)
    assert await world.redis.xlen(stream) == 0
    assert await world.redis.exists(stream) == 1
    await world.lose("a")
    await sweep.after(1.0)
    assert await world.redis.exists(stream) == 0
    assert await world.redis.smembers(keys.QUEUE_INDEX) == set()


async def test_long_queues_are_walked_to_their_end(world: World, sweep: Sweep) -> None:
    await world.replica("a")
    for number in range(450):
        request = world.request(f"q{number}")
        await world.store.enqueue(request, keys.BEST_EFFORT_QUEUE, verdict="best_effort")
    await sweep.after(4.0)
    assert await world.redis.xlen(keys.BEST_EFFORT_QUEUE) == 0  # nobody lives who waits for them


async def test_one_router_at_a_time_looks_and_a_dead_one_loses_the_lock(world: World) -> None:
    first = ExpiringLock(world.redis, keys.ORPHAN_LOCK, "router-a", 0.2)
    second = ExpiringLock(world.redis, keys.ORPHAN_LOCK, "router-b", 5.0)
    assert await first.hold()
    assert await first.hold()
    assert not await second.hold()
    await world.redis.delete(keys.ORPHAN_LOCK)  # as its expiry does
    assert await second.hold()
    assert not await first.hold()
    assert await world.redis.pttl(keys.ORPHAN_LOCK) > 0
