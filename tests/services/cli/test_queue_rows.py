from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.cli.ports import find_free_ports
from services.cli.queue_rows import read_queues
from services.common import keys
from services.common.broker import connect
from services.common.embedded_redis import EmbeddedRedis


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator["Redis"]:
    with EmbeddedRedis(tmp_path / "redis", port=find_free_ports(1)[0]) as server:
        client = await connect(server.url)
        yield client
        await client.aclose()


async def test_a_queue_shows_what_waits_what_runs_and_who_reads(redis: "Redis") -> None:
    stream = keys.queue_key("w0", "tight")
    await redis.xgroup_create(stream, keys.GROUP, id="0", mkstream=True)
    seconds, _ = await redis.time()
    await redis.xadd(stream, {"id": "r1"}, id=f"{(seconds - 30) * 1000}-0")
    await redis.xadd(stream, {"id": "r2"})
    await redis.xreadgroup(keys.GROUP, "w0/1", {stream: ">"}, count=1)
    (row,) = await read_queues(redis)
    assert (row.replica, row.tier, row.depth, row.pending, row.waiting) == ("w0", "tight", 2, 1, 1)
    assert row.consumers == ("w0/1",)
    assert row.oldest_age_s is not None and 29 <= row.oldest_age_s <= 35


async def test_an_empty_queue_has_no_age(redis: "Redis") -> None:
    await redis.xgroup_create(keys.BEST_EFFORT_QUEUE, keys.GROUP, id="0", mkstream=True)
    (row,) = await read_queues(redis)
    assert (row.depth, row.oldest_age_s, row.consumers) == (0, None, ())


async def test_best_effort_comes_after_the_tiers_and_dead_letters_last(redis: "Redis") -> None:
    for stream in (keys.DEAD_LETTERS, keys.BEST_EFFORT_QUEUE, keys.queue_key("w1", "loose"), keys.queue_key("z", "a")):
        await redis.xadd(stream, {"id": "r"})
    assert [row.tier for row in await read_queues(redis)] == ["loose", "a", "best-effort", "dead letters"]
