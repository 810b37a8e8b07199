"""A worker that holds first tokens back: real Redis, real gRPC, a scripted engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from protos import types_pb2
from tests.services.worker.worker_world import World, eventually, running_world


@pytest.fixture
async def holding(redis: Redis, redis_url: str, unique: str, tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(redis, redis_url, unique, tmp_path, hold_first_token=True) as running:
        yield running


async def produced(world: World, request_id: str, steps: int) -> None:
    """Let the engine produce and the worker take what it produced."""
    world.engine.step(steps)
    await eventually(lambda: world.worker._generations.get(request_id)._produced == steps)


async def test_a_first_token_leaves_at_its_deadline_with_what_came_meanwhile(holding: World, unique: str) -> None:
    request = holding.request(unique, max_tokens=20)
    request.ttft_deadline_us = holding.clock.now_us() + 1_500_000
    await holding.submit(request)
    await holding.engine.until_running(unique)
    await produced(holding, unique, 3)
    assert unique not in holding.listener.ids
    assert await holding.listener.tokens(unique, 1) == [1000, 1001, 1002]
    assert holding.listener.chunks[unique][0].emitted_at_us >= request.ttft_deadline_us - 5_000
    holding.engine.step()
    assert await holding.listener.tokens(unique, 4) == [1000, 1001, 1002, 1003]


async def test_the_scheduler_lets_it_go_before(holding: World, unique: str) -> None:
    request = holding.request(unique, max_tokens=20)
    request.ttft_deadline_us = holding.clock.now_us() + 600_000_000
    await holding.submit(request)
    await holding.engine.until_running(unique)
    await produced(holding, unique, 2)
    holding.engine.report(released=(unique,))
    assert await holding.listener.tokens(unique, 2) == [1000, 1001]
    (chunk,) = holding.listener.chunks[unique]
    assert chunk.emitted_at_us <= holding.clock.now_us()
    await holding.until_recorded(unique, state="running")


async def test_best_effort_is_never_held(holding: World, unique: str) -> None:
    request = holding.request(unique, promised=False, tier="best-effort")
    request.ttft_deadline_us = holding.clock.now_us() + 600_000_000
    await holding.submit(request)
    await holding.engine.until_running(unique)
    holding.engine.step()
    assert await holding.listener.tokens(unique, 1) == [1000]


async def test_a_short_request_leaves_whole_when_it_ends(holding: World, unique: str) -> None:
    request = holding.request(unique)
    request.ttft_deadline_us = holding.clock.now_us() + 600_000_000
    await holding.submit(request)
    await holding.engine.until_running(unique)
    holding.engine.step(3)
    end = await holding.listener.end(unique)
    assert end.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert holding.listener.ids[unique] == [1000, 1001, 1002]


async def test_what_is_held_of_a_cancelled_request_is_dropped(holding: World, unique: str) -> None:
    request = holding.request(unique, max_tokens=20)
    request.ttft_deadline_us = holding.clock.now_us() + 600_000_000
    await holding.submit(request)
    await holding.engine.until_running(unique)
    await produced(holding, unique, 2)
    assert await holding.worker._generations.cancel(unique, 1, "client")
    end = await holding.listener.end(unique)
    assert end.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert holding.listener.ids.get(unique, []) == []
