"""A worker whose Redis is behind a connection that breaks, or on a disk that fills up."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.broker import connect
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import Reason, SloServeError
from services.common.request_record import RequestState
from tests.faults.tcp_proxy import TcpProxy
from tests.services.worker.worker_world import eventually, running_world

DISK_BYTES = 8 << 20


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].partition("/")[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def test_an_entry_whose_reply_was_lost_is_found_within_seconds(
    redis_url: str, unique: str, tmp_path: Path
) -> None:
    async with TcpProxy(port_of(redis_url)) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        redis, direct = await connect(url), await connect(redis_url)
        async with running_world(redis, url, unique, tmp_path) as world:
            world.store = type(world.store)(direct, world.clock)  # a client of its own, over a sound connection
            proxy.swallow = unique.encode() + b"-lost"
            await world.submit(world.request(f"{unique}-lost"))
            await eventually(lambda: proxy.swallow is None)
            async with asyncio.timeout(10):  # another consumer would take it over after half a minute
                await world.engine.until_running(f"{unique}-lost")
            assert (await world.record(f"{unique}-lost")).attempt == 1
        await redis.aclose()
        await direct.aclose()


async def test_broken_connections_run_nothing_twice(redis_url: str, unique: str, tmp_path: Path) -> None:
    async with TcpProxy(port_of(redis_url)) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        redis, direct = await connect(url), await connect(redis_url)
        async with running_world(redis, url, unique, tmp_path) as world:
            world.store = type(world.store)(direct, world.clock)  # clients of their own, over a sound connection
            wanted = [f"{unique}-{number}" for number in range(40)]
            for number, request_id in enumerate(wanted):
                await world.submit(world.request(request_id, max_tokens=100))
                if number % 2:
                    proxy.cut()
            async with asyncio.timeout(20):
                await world.engine.until_running(*wanted)
            assert sorted(world.engine.running) == sorted(wanted)
            world.engine.step()
            for request_id in wanted:
                record = await world.until_recorded(request_id, state="running")
                assert record.attempt == 1
            assert proxy.connections > 20
        await redis.aclose()
        await direct.aclose()


async def test_on_a_full_disk_what_runs_goes_on_and_what_is_new_is_unavailable(
    small_disk: Path, unique: str, tmp_path: Path
) -> None:
    with EmbeddedRedis(small_disk / "redis") as server:
        redis = await connect(server.url)
        async with running_world(redis, server.url, unique, tmp_path, lease_s=0.5) as world:
            await world.submit(world.request(unique, max_tokens=3))
            await world.engine.until_running(unique)
            world.engine.step()
            await world.until_recorded(unique, state="running")
            filler = small_disk / "filler"
            fill(filler)
            refused = await until_refused(world, unique)
            assert refused.reason is Reason.BROKER_UNAVAILABLE
            assert refused.retry_after_ms
            await eventually(lambda: not world.worker.lease_held)
            world.engine.step(2)
            assert await world.listener.tokens(unique, 3) == [1000, 1001, 1002]
            await world.listener.end(unique)
            filler.unlink()
            assert (await world.until_recorded(unique, state="finished")).state is RequestState.FINISHED
            await eventually(lambda: world.worker.lease_held)
            later = f"{unique}-later"
            await world.submit(world.request(later))
            await world.engine.until_running(later)
        await redis.aclose()


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 64):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


async def until_refused(world, unique: str) -> SloServeError:
    """Append until Redis refuses: it notices a full disk when it next writes its file."""
    async with asyncio.timeout(20):
        number = 0
        while True:
            number += 1
            request = world.request(f"{unique}-f{number}", prompt_token_ids=[20 + n % 3000 for n in range(2000)])
            try:
                await world.store.enqueue(request, f"slos:q:nobody-{unique}:loose", verdict="admitted")
            except SloServeError as error:
                return error
            await asyncio.sleep(0.01)
