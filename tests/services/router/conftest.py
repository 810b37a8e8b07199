"""A router served over gRPC, its Redis, and a scripted planner.

The index of the fleet is one for all: these tests have a server of their own, emptied before each.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protos import planner_pb2_grpc, router_pb2_grpc
from services.common.broker import connect
from services.common.clock import Clock
from services.common.config import load_catalogue
from services.common.embedded_redis import EmbeddedRedis
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer, open_channel
from services.router.compose import compose
from services.router.settings import RouterSettings
from tests.services.router.world import ScriptedPlanner, World
from tests.tasks import no_task_left

CATALOGUE = Path(__file__).parents[3] / "deploy" / "slos.yaml"


@pytest.fixture(scope="session")
def router_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("router-redis")) as server:
        yield server


@pytest.fixture
async def world(router_redis: EmbeddedRedis) -> AsyncIterator[World]:
    async with no_task_left(), running_world(router_redis) as running:
        yield running


@asynccontextmanager
async def running_world(router_redis: EmbeddedRedis) -> AsyncIterator[World]:
    redis = await connect(router_redis.url)
    await redis.flushall()
    planner, planner_server = ScriptedPlanner(), RpcServer("127.0.0.1:0")
    planner_pb2_grpc.add_PlannerServicer_to_server(planner, planner_server.grpc)
    await planner_server.start([])
    settings = RouterSettings(
        redis_url=router_redis.url,
        catalogue=CATALOGUE,
        planners=(f"127.0.0.1:{planner_server.port}",),
        reoffer_ms=20,
        best_effort_limit=3,
        max_losses=3,
    )
    parts = compose(settings, load_catalogue(CATALOGUE), redis, Clock())
    server = RpcServer("127.0.0.1:0")
    router_pb2_grpc.add_RouterServicer_to_server(parts.service, server.grpc)
    await server.start([])
    await parts.fleet.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        yield World(redis, router_redis, planner, planner_server, parts, stub, RequestStore(redis))
    await server.stop(0)
    await parts.fleet.stop()
    await parts.planners.close()
    await planner_server.stop(0)
    await redis.aclose()
