"""A Redis that is up but cannot serve is an outage like any other."""

from pathlib import Path

import pytest

from protos import router_pb2
from services.common.broker import command, connect
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import Reason, SloServeError
from services.common.registry import ReplicaRegistry

REFUSING = {
    "full": [("CONFIG", "SET", "maxmemory", "1")],
    "read-only": [("REPLICAOF", "127.0.0.1", "1")],
    "without its primary": [("CONFIG", "SET", "replica-serve-stale-data", "no"), ("REPLICAOF", "127.0.0.1", "1")],
}


@pytest.mark.parametrize("words", REFUSING.values(), ids=REFUSING)
async def test_a_server_that_refuses_writes_is_not_available(words: list[tuple[str, ...]], tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        redis = await connect(server.url)
        registry = ReplicaRegistry(redis)
        await registry.publish(router_pb2.Replica(replica_id="w0", started_us=1), 30.0)
        for setting in words:
            await redis.execute_command(*setting)
        for refused in (command(redis, "SET", "slos:x", "1"), registry.renew("w0", 1, 30.0, running=1)):
            with pytest.raises(SloServeError) as caught:
                await refused
            assert caught.value.reason is Reason.BROKER_UNAVAILABLE
            assert caught.value.retry_after_ms
        await redis.aclose()
