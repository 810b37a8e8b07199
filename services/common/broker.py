"""The connection to Redis, and what its absence is called.

Replies are pinned to RESP2 and stay bytes: whoever reads a field decodes it. Commands are retried briefly on a broken
connection, so every write must be safe to repeat; the Lua scripts are.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common.config import ConfigError
from services.common.errors import Reason, SloServeError

__all__ = ["OLDEST_VERSION", "SOCKET_TIMEOUT_S", "broker_errors", "command", "connect", "open_redis", "redacted_url"]

OLDEST_VERSION = (6, 2)
SOCKET_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 64
RETRY_AFTER_MS = 1000.0

# Replies of a server that is up but cannot serve writes: loading its file, full, read-only, or its disk fails.
_REFUSALS = ("LOADING", "OOM", "READONLY", "MISCONF", "MASTERDOWN", "NOREPLICAS", "BUSY ")


def redacted_url(redis_url: str) -> str:
    """The URL without user and password, fit for a log."""
    parts = urlsplit(redis_url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def open_redis(redis_url: str) -> Redis:
    """A client of `redis_url` that connects on first use. rediss:// means TLS; the password is in the URL.

    Raises ConfigError where the URL means nothing.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            redis_url,
            max_connections=MAX_CONNECTIONS,
            timeout=SOCKET_TIMEOUT_S,  # a burst waits its turn; the ordinary pool refuses its hundredth command
            protocol=2,
            decode_responses=False,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            socket_keepalive=None if redis_url.startswith("unix:") else True,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 3),
            driver_info=DriverInfo(),  # or each new connection looks its version up on disk, in the middle of a burst
        )
    except ValueError as error:
        raise ConfigError(f"environment: SLOS_REDIS_URL: {redacted_url(redis_url)}: {error}") from None
    return Redis.from_pool(pool)


async def connect(redis_url: str, *, tries: int = 10, delay_s: float = 0.5) -> Redis:
    """A client whose server has answered and is new enough.

    Raises SloServeError BROKER_UNAVAILABLE naming the URL (without password) after `tries` attempts `delay_s` apart,
    ConfigError where the server answers but will not serve us: a wrong password, a version before 6.2.
    """
    client = open_redis(redis_url)
    name = redacted_url(redis_url)
    for attempt in range(tries):
        try:
            info: dict[str, Any] = await client.info("server")
            _check_version(str(info["redis_version"]), name)
            return client
        except AuthenticationError as error:
            await client.aclose()
            raise ConfigError(f"environment: SLOS_REDIS_URL: {name} refuses the credentials: {error}") from None
        except (RedisError, OSError) as error:
            if attempt + 1 == tries:
                await client.aclose()
                raise SloServeError(Reason.BROKER_UNAVAILABLE, f"no Redis at {name}: {_brief(error)}") from None
            await asyncio.sleep(delay_s)
        except ConfigError:
            await client.aclose()
            raise
    raise ValueError("tries must be at least 1")


def _check_version(version: str, name: str) -> None:
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < OLDEST_VERSION:
        raise ConfigError(f"environment: SLOS_REDIS_URL: {name} is Redis {version}; 6.2 or newer is needed")


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


async def command(redis: Redis, *words: object, **options: object) -> Any:
    """One command and its reply, errors as in `broker_errors`; `options` go to the reply's parser."""
    with broker_errors():
        return await redis.execute_command(*words, **options)  # type: ignore[no-untyped-call]


@contextmanager
def broker_errors() -> Iterator[None]:
    """Turn a lost or refusing Redis into SloServeError BROKER_UNAVAILABLE with a retry delay; other errors pass."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise _unavailable(error) from error
    except ResponseError as error:
        if _refuses(error):
            raise _unavailable(error) from error
        raise


def _refuses(error: ResponseError) -> bool:
    """Whether the server is up but cannot serve; Redis 6.2 buries a script's error in a sentence of its own.

    The client takes the code off the text of those errors that it has a class for.
    """
    text = str(error)
    return (error.status_code or text).startswith(_REFUSALS) or any(f"-{refusal}" in text for refusal in _REFUSALS)


def _unavailable(error: Exception) -> SloServeError:
    return SloServeError(
        Reason.BROKER_UNAVAILABLE, f"Redis is not available: {_brief(error)}", retry_after_ms=RETRY_AFTER_MS
    )
