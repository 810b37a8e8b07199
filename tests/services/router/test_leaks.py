"""A router with nothing to place holds no task more than before, however its calls ended."""

import asyncio

import grpc.aio
import pytest

from protos import router_pb2, types_pb2
from services.common.errors import Reason
from tests.services.router.world import World, error_of
from tests.tasks import IdleTasks


async def test_nothing_is_left_of_calls_however_they_end(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    idle = IdleTasks()
    waiting = world.stub.Place(
        router_pb2.PlaceRequest(
            request=world.request("waiting", ttft_ms=8000), on_infeasible=types_pb2.ON_INFEASIBLE_WAIT
        )
    )
    await world.planner.asked_times(2)
    waiting.cancel()
    refused = world.place(world.request("refused"), types_pb2.ON_INFEASIBLE_REJECT)
    assert (await error_of(refused)).reason is Reason.NO_CAPACITY
    world.planner.admit("a")
    assert (await world.place(world.request("placed"))).replica_id == "a"
    world.planner.together = asyncio.Event()  # never set: a planner that does not answer
    with pytest.raises(grpc.aio.AioRpcError):
        await world.stub.Quote(router_pb2.RouterQuoteRequest(request=world.request("quoted")), timeout=0.2)
    world.planner.together.set()
    await idle.returned()
