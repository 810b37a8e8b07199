import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import router_pb2, router_pb2_grpc, types_pb2
from services.common import keys
from services.common.rpc import open_channel
from tests.services.router.world import World

ROOT = Path(__file__).parents[3]
WAIT_S = 30


def environment(world: World, data_dir: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLOS_", "OTEL_"))}
    return {
        **kept,
        "SLOS_REDIS_URL": world.server.url,
        "SLOS_PORT": "0",
        "SLOS_CATALOGUE": str(ROOT / "deploy" / "slos.yaml"),
        "SLOS_DATA_DIR": str(data_dir),
        **more,
    }


@asynccontextmanager
async def router(env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.router"),
        cwd=ROOT,
        env=env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ready_port(process: asyncio.subprocess.Process) -> int:
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), WAIT_S)).decode()
    assert line.startswith("router ready on 127.0.0.1:")
    return int(line.rpartition(":")[2])


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str]:
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode is not None
    return process.returncode, errors.decode()


def span_names(data_dir: Path) -> set[str]:
    lines = [line for path in data_dir.rglob("*.jsonl") for line in path.read_text().splitlines()]
    return {json.loads(line)["name"] for line in lines}


async def test_the_process_serves_traces_and_stops_when_told(world: World, tmp_path: Path) -> None:
    await world.replica("a")
    async with router(environment(world, tmp_path, SLOS_PLANNERS="127.0.0.1:1")) as process:
        port = await ready_port(process)
        async with open_channel(f"127.0.0.1:{port}", traced=False) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service="slosserve.v1.Router"), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            place = router_pb2.PlaceRequest(request=world.request("r"))
            response = await router_pb2_grpc.RouterStub(channel).Place(place, timeout=10)
        assert response.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_NO_PLANNER
        process.send_signal(signal.SIGTERM)
        assert (await ended(process))[0] == 0
    assert {"route", "hop a"} <= span_names(tmp_path)


async def test_waiting_calls_do_not_hold_up_the_end(world: World, tmp_path: Path) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    planner = f"127.0.0.1:{world.planner_server.port}"
    async with router(environment(world, tmp_path, SLOS_PLANNERS=planner)) as process:
        port = await ready_port(process)
        async with open_channel(f"127.0.0.1:{port}") as channel:
            place = router_pb2.PlaceRequest(
                request=world.request("r", ttft_ms=60_000), on_infeasible=types_pb2.ON_INFEASIBLE_WAIT
            )
            placing = asyncio.ensure_future(router_pb2_grpc.RouterStub(channel).Place(place, timeout=60))
            await world.planner.asked_times(1)
            process.send_signal(signal.SIGTERM)
            [outcome] = await asyncio.wait_for(asyncio.gather(placing, return_exceptions=True), 10)
            assert isinstance(outcome, grpc.aio.AioRpcError)
            assert outcome.code() is grpc.StatusCode.UNAVAILABLE
        assert (await ended(process))[0] == 0


async def test_a_bad_value_stops_the_start_and_names_its_variable(world: World, tmp_path: Path) -> None:
    for name, value in (("SLOS_PLANNERS", "nonsense"), ("SLOS_REOFFER_MS", "soon"), ("SLOS_CATALOGUE", "absent.yaml")):
        async with router(environment(world, tmp_path, **{name: value})) as process:
            status, errors = await ended(process)
        assert status == 2
        assert name in errors
        assert "Traceback" not in errors


async def test_an_absent_redis_is_named_without_its_password(world: World, tmp_path: Path) -> None:
    url = "redis://:hunter2secret@127.0.0.1:1/0"
    async with router(environment(world, tmp_path, SLOS_REDIS_URL=url)) as process:
        status, errors = await ended(process)
    assert status == 3
    assert errors.count("\n") == 1
    assert "redis://127.0.0.1:1/0" in errors
    assert "hunter2secret" not in errors


async def test_it_ends_where_one_of_its_tasks_has_ended(world: World, tmp_path: Path) -> None:
    await world.redis.hset(keys.ORPHAN_LOCK, "no", "lock")  # what holds the lock fails on another type
    async with router(environment(world, tmp_path, SLOS_PLANNERS="127.0.0.1:1")) as process:
        await ready_port(process)
        status, errors = await ended(process)
    assert status != 0
    assert "task 'orphanage' has ended" in errors
