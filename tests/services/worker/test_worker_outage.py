"""Redis goes away and comes back under a running worker."""

import asyncio
from pathlib import Path

import pytest

from protos import types_pb2
from services.common.broker import connect
from services.common.embedded_redis import EmbeddedRedis
from services.common.request_record import RequestState
from services.worker import housekeeping
from tests.services.worker.worker_world import eventually, running_world


async def test_generations_outlive_redis_and_their_end_is_recorded_when_it_is_back(unique: str, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis", appendfsync="always") as server:
        redis = await connect(server.url)
        async with running_world(redis, server.url, unique, tmp_path) as world:
            await world.submit(world.request(unique))
            await world.engine.until_running(unique)
            world.engine.step()
            await world.until_recorded(unique, state="running")
            await asyncio.to_thread(server.kill)

            world.engine.step(2)
            end = await world.listener.end(unique)
            assert end.finish_reason == types_pb2.FINISH_REASON_LENGTH
            assert world.listener.ids[unique] == [1000, 1001, 1002]

            await asyncio.to_thread(server.start)
            await world.until_recorded(unique, state="finished")
            assert await redis.xlen(world.queue("loose")) == 0

            follower = f"{unique}-2"
            await world.submit(world.request(follower))
            await world.engine.until_running(follower)
        await redis.aclose()


async def test_a_running_request_survives_the_lease_that_an_outage_cost(unique: str, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis", appendfsync="always") as server:
        redis = await connect(server.url)
        async with running_world(redis, server.url, unique, tmp_path, lease_s=0.5) as world:
            await world.submit(world.request(unique, max_tokens=50))
            await world.engine.until_running(unique)
            world.engine.step()
            await world.until_recorded(unique, state="running")
            await asyncio.to_thread(server.kill)
            await eventually(lambda: not world.worker.lease_held)
            await asyncio.to_thread(server.start)
            await eventually(lambda: world.worker.lease_held)
            assert unique in world.engine.running
            assert (await world.record(unique)).state is RequestState.RUNNING
            world.engine.step(2)
            assert await world.listener.tokens(unique, 3) == [1000, 1001, 1002]
        await redis.aclose()


async def test_outages_are_no_deliveries_of_what_runs(unique: str, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis", appendfsync="always") as server:
        redis = await connect(server.url)
        async with running_world(redis, server.url, unique, tmp_path) as world:
            await world.submit(world.request(unique, max_tokens=50))
            await world.engine.until_running(unique)
            world.engine.step()
            await world.until_recorded(unique, state="running")
            for number in range(4):
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
                probe = f"{unique}-{number}"  # once it runs, the worker reads its queues again
                await world.submit(world.request(probe))
                await world.engine.until_running(probe)
            assert (await world.record(unique)).state is RequestState.RUNNING
            assert await redis.xlen("slos:dead") == 0
            world.engine.step(3)
            assert len(await world.listener.tokens(unique, 4)) == 4
            assert unique not in world.listener.ended
        await redis.aclose()


async def test_a_worker_survives_that_its_entries_cannot_be_refreshed(
    unique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(housekeeping, "_ROUND_S", 0.01)  # so that a refresh falls into the outage
    with EmbeddedRedis(tmp_path / "redis", appendfsync="always") as server:
        redis = await connect(server.url)
        async with running_world(redis, server.url, unique, tmp_path) as world:
            await world.submit(world.request(unique))
            await world.engine.until_running(unique)
            await asyncio.to_thread(server.kill)
            await eventually(lambda: world.serving.done() or "queue entries are not refreshed" in caplog.text)
            await asyncio.to_thread(server.start)
            world.engine.step(3)
            await world.until_recorded(unique, state="finished")
            assert not world.serving.done()
        await redis.aclose()
