"""Who is asked, in which order and how often: affinity, the hop budget, a fleet that changes, several routers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from protos import types_pb2
from services.common.clock import Clock
from services.common.config import load_catalogue
from services.common.registry import ReplicaRegistry
from services.core.placement import OrderName
from services.router.compose import RouterParts, compose
from services.router.settings import RouterSettings
from tests.services.router.conftest import CATALOGUE
from tests.services.router.world import World

ADMITTED = types_pb2.VERDICT_KIND_ADMITTED
BEST_EFFORT = types_pb2.ON_INFEASIBLE_BEST_EFFORT
WAIT = types_pb2.ON_INFEASIBLE_WAIT


@asynccontextmanager
async def another_router(world: World, **settings: object) -> AsyncIterator[RouterParts]:
    """One more router over the same Redis and planner."""
    values = {"redis_url": world.server.url, "catalogue": CATALOGUE, "reoffer_ms": 20.0, **settings}
    own = RouterSettings(planners=(f"127.0.0.1:{world.planner_server.port}",), **values)
    parts = compose(own, load_catalogue(CATALOGUE), world.redis, Clock())
    await parts.fleet.start()
    try:
        yield parts
    finally:
        await parts.fleet.stop()
        await parts.planners.close()


def asked(world: World) -> list[str]:
    return [replica_id for replica_id, _ in world.planner.asked]


async def test_the_same_prompt_returns_to_where_it_went(world: World) -> None:
    await world.replica("a", running=1)
    await world.replica("b", running=8)
    world.planner.refuse("b")
    world.planner.admit("a")
    await world.place(world.request("first", prompt_tokens=256))
    world.planner.admit("b")
    world.planner.asked.clear()
    assert (await world.place(world.request("again", prompt_tokens=300))).replica_id == "a"
    other = world.request("other", prompt_tokens=200)  # easier than what b has just declined
    other.prompt_token_ids[:] = range(5000, 5200)
    assert (await world.place(other)).replica_id == "b"
    assert asked(world) == ["a", "b"]


async def test_a_replica_that_restarts_has_an_empty_cache(world: World) -> None:
    await world.replica("a", running=1)
    await world.replica("b")
    world.planner.admit("a")
    world.planner.admit("b")
    await world.place(world.request("first", prompt_tokens=256))
    await world.replica("a", started_us=2)
    await world.replica("b", running=8)
    assert (await world.place(world.request("again", prompt_tokens=256))).replica_id == "b"


async def test_another_tenants_request_says_nothing_about_a_session(world: World) -> None:
    await world.replica("a")
    await world.replica("b", running=8)
    world.planner.admit("a")
    world.planner.admit("b")
    stranger = world.request("first")
    stranger.tenant = "other"
    await world.place(stranger)
    await world.replica("a", running=20)
    response = await world.place(world.request("second"), previous_request_id="first")
    assert response.replica_id == "a"


async def test_the_budget_ends_with_the_least_loaded_replica(world: World) -> None:
    for index in range(6):
        await world.replica(f"r{index}", running=60 - 10 * index)
        world.planner.refuse(f"r{index}")
    world.planner.admit("r5")
    async with another_router(world, max_hops=3) as router:
        request = world.request("r")
        deadline_us = request.ttft_deadline_us
        response = await router.placer.place(request, BEST_EFFORT)
    assert asked(world) == ["r0", "r1", "r5"]
    assert (response.replica_id, response.verdict.hops) == ("r5", 3)
    assert {candidate.ttft_deadline_us for _, candidate in world.planner.asked} == {deadline_us}


async def test_hopeless_on_those_asked_is_not_hopeless_on_the_rest(world: World) -> None:
    for index in range(4):
        await world.replica(f"r{index}", running=40 - 10 * index)
        world.planner.refuse(f"r{index}", types_pb2.CONSTRAINT_KIND_HOPELESS)
    async with another_router(world, max_hops=2) as router:
        placing = asyncio.ensure_future(router.placer.place(world.request("r", ttft_ms=8000), WAIT))
        await world.planner.asked_times(4)
        assert not placing.done()
        for index in range(4):
            world.planner.admit(f"r{index}")
        assert (await placing).verdict.kind == ADMITTED


async def test_a_burst_does_not_ask_again_who_has_just_declined_the_same(world: World) -> None:
    await world.replica("a", running=8)
    await world.replica("b")
    world.planner.refuse("a")
    world.planner.admit("b")
    for index in range(3):
        await world.place(world.request(f"r{index}"))
    easier = world.request("easier", ttft_ms=5000)
    world.planner.admit("a")
    await world.place(easier)
    assert asked(world) == ["a", "b", "b", "b", "a"]


async def test_slow_hardware_is_asked_after_what_can_be_in_time(world: World) -> None:
    slow = types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=1e-3, b=0.02)])
    await world.replica("slow", running=30, perf_model=slow)
    await world.replica("fast")
    world.planner.admit("slow")
    world.planner.admit("fast")
    assert (await world.place(world.request("long", ttft_ms=500, prompt_tokens=800))).replica_id == "fast"
    assert (await world.place(world.request("short", ttft_ms=500, prompt_tokens=50))).replica_id == "slow"


async def test_one_that_joins_is_asked_and_one_that_leaves_is_not(world: World) -> None:
    await world.replica("a", running=8)
    world.planner.admit("a")
    world.planner.admit("late")
    assert (await world.place(world.request("first"))).replica_id == "a"
    await world.replica("late", running=20)
    assert (await world.place(world.request("second"))).replica_id == "late"
    await ReplicaRegistry(world.redis).remove("late", 1)
    await world.parts.fleet.refresh()
    assert (await world.place(world.request("third"))).replica_id == "a"


async def test_routers_agree_about_a_request_that_both_are_asked_to_place(world: World) -> None:
    await world.replica("a")
    world.planner.admit("a")
    async with another_router(world) as other:
        both = [world.parts.placer, other.placer]
        placed = await asyncio.gather(*(placer.place(world.request("r"), BEST_EFFORT) for placer in both))
        assert placed[0].entry_id == placed[1].entry_id
        assert await world.redis.xlen(placed[0].stream) == 1


@pytest.mark.parametrize(
    ("order", "first"), [(OrderName.LEAST_LOADED, ["c", "b"]), (OrderName.ROUND_ROBIN, ["b", "c"])]
)
async def test_the_order_is_a_setting(world: World, order: OrderName, first: list[str]) -> None:
    for name, running in (("a", 30), ("b", 20), ("c", 0)):
        await world.replica(name, running=running)
        world.planner.admit(name)
    async with another_router(world, order=order) as router:
        placed = [await router.placer.place(world.request(f"r{index}"), BEST_EFFORT) for index in range(2)]
    assert [response.replica_id for response in placed] == first
