import asyncio
import socket
import sys
import threading
from pathlib import Path

import psutil
import pytest

from protos import types_pb2
from services.common import keys
from services.common.broker import connect, open_redis, redacted_url
from services.common.config import ConfigError
from services.common.embedded_redis import EmbeddedRedis, EmbeddedRedisError
from services.common.errors import Reason, SloServeError
from services.common.registry import ReplicaWatcher
from services.common.request_record import RequestState
from services.common.request_store import RequestStore
from services.common.stream_reader import StreamReader
from tests.services.owners import claim, lease

OWNER = keys.owner_name("w0", 1)
QUEUE = keys.queue_key("w0", "tight")


async def test_every_acknowledged_entry_survives_a_killed_redis_and_readers_go_on(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    redis = await connect(server.start())
    store = RequestStore(redis)
    try:
        for number in range(50):
            request = types_pb2.QueuedRequest(request_id=f"r{number}", attempt=1)
            await store.enqueue(request, QUEUE, verdict="ADMITTED")
        deliveries = StreamReader(redis, OWNER, block_ms=20).deliveries(lambda: [QUEUE])
        first = await asyncio.wait_for(anext(deliveries), 5)
        await lease(redis, "w0", 1, 60.0)
        assert await claim(store, first.request.request_id, 1, OWNER) == 1
        watcher = ReplicaWatcher(redis)
        await watcher.refresh()

        server.kill()
        with pytest.raises(SloServeError) as caught:
            await store.get("r0")
        assert caught.value.reason is Reason.BROKER_UNAVAILABLE
        with pytest.raises(SloServeError):
            await watcher.refresh()
        assert list(watcher.replicas) == ["w0"]  # the last view stays

        server.start()
        record = await store.get("r0")
        assert record is not None
        assert record.state is RequestState.CLAIMED
        assert await redis.xlen(QUEUE) == 50
        rest = [await asyncio.wait_for(anext(deliveries), 10) for _ in range(49)]
        assert [item.request.request_id for item in rest] == [f"r{number}" for number in range(1, 50)]
    finally:
        await redis.aclose()
        server.stop()


async def test_a_stopped_server_keeps_its_port_and_data(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    url = server.start()
    redis = await connect(url)
    await redis.set("slos:x", "1")
    await redis.aclose()
    server.stop()
    assert server.start() == url
    redis = await connect(url)
    assert await redis.get("slos:x") == b"1"
    await redis.aclose()
    server.stop()


def test_a_taken_port_is_named_in_the_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedRedisError, match=str(port)):
            EmbeddedRedis(tmp_path / "redis", port=port).start()


HOLDER = """
import signal, sys
from pathlib import Path
from services.common.embedded_redis import EmbeddedRedis

server = EmbeddedRedis(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked to end it, which is Linux's")
async def test_it_ends_with_a_killed_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(tmp_path)), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    server = psutil.Process(int(await parent.stdout.readline()))
    assert server.is_running()
    parent.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, [server], timeout=20)
    assert not alive


async def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    thread = threading.Thread(target=server.start)
    thread.start()
    await asyncio.to_thread(thread.join)
    _, alive = await asyncio.to_thread(psutil.wait_procs, [psutil.Process(server.pid)], timeout=0.5)
    assert alive
    server.stop()


async def test_an_absent_redis_is_named_without_its_password() -> None:
    with pytest.raises(SloServeError) as caught:
        await connect("redis://user:hunter2secret@127.0.0.1:1/0", tries=2, delay_s=0.01)
    assert caught.value.reason is Reason.BROKER_UNAVAILABLE
    assert "redis://127.0.0.1:1/0" in caught.value.text
    assert "hunter2secret" not in caught.value.text


async def test_a_wrong_password_refuses_the_start(redis_url: str) -> None:
    with pytest.raises(ConfigError, match="SLOS_REDIS_URL") as caught:
        await connect(redis_url.replace("redis://", "redis://nobody:hunter2secret@"), tries=1)
    assert "hunter2secret" not in str(caught.value)


def test_a_url_that_means_nothing_names_its_variable() -> None:
    with pytest.raises(ConfigError, match="SLOS_REDIS_URL"):
        open_redis("http://127.0.0.1:6379")


def test_redacting_keeps_what_is_needed_to_find_the_server() -> None:
    assert redacted_url("rediss://u:p@host:6380/2?ssl_cert_reqs=none") == "rediss://host:6380/2"
    assert redacted_url("unix:///run/redis.sock") == "unix:///run/redis.sock"
