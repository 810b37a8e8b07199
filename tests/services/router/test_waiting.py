import asyncio
import time

from protos import types_pb2
from services.common.errors import Reason
from tests.services.router.world import World, error_of, verdict_in

ADMITTED = types_pb2.VERDICT_KIND_ADMITTED
WAIT = types_pb2.ON_INFEASIBLE_WAIT


async def test_waiting_is_over_as_soon_as_there_is_room(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    placing = asyncio.ensure_future(world.place(world.request("r", ttft_ms=8000), WAIT))
    await world.planner.asked_times(3)
    assert not placing.done()
    assert await world.redis.keys("slos:q:*") == []  # nothing was promised, so nothing is durable
    world.planner.admit("a")
    response = await placing
    assert response.verdict.kind == ADMITTED
    assert response.verdict.hops == len(world.planner.asked) >= 4


async def test_waiting_for_a_replica_ends_when_one_comes(world: World) -> None:
    world.planner.admit("late")
    placing = asyncio.ensure_future(world.place(world.request("r", ttft_ms=8000), WAIT))
    done, _ = await asyncio.wait([placing], timeout=0.2)
    assert not done
    await world.replica("late")
    assert (await placing).replica_id == "late"


async def test_waiting_ends_with_the_first_token_deadline(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    started_s = time.monotonic()
    error = await error_of(world.place(world.request("r", ttft_ms=300), WAIT))
    assert error.reason is Reason.NO_CAPACITY
    assert 0.25 < time.monotonic() - started_s < 2
    assert 2 <= verdict_in(error).hops == len(world.planner.asked) <= 16


async def test_waiting_ends_with_the_clients_deadline(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    request = world.request("r", ttft_ms=8000)
    request.client_deadline_us = request.arrival_us + 150_000
    assert (await error_of(world.place(request, WAIT))).reason is Reason.CLIENT_DEADLINE


async def test_waiting_is_pointless_where_it_would_be_late_even_alone(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a", types_pb2.CONSTRAINT_KIND_HOPELESS)
    started_s = time.monotonic()
    assert (await error_of(world.place(world.request("r", ttft_ms=8000), WAIT))).reason is Reason.NO_CAPACITY
    assert time.monotonic() - started_s < 2


async def test_a_stopping_router_hands_its_waiting_calls_on(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    placing = asyncio.ensure_future(world.place(world.request("r", ttft_ms=8000), WAIT))
    await world.planner.asked_times(1)
    world.parts.placer.stop_waiting()
    assert (await error_of(placing)).reason is Reason.ROUTER_UNAVAILABLE
