"""Fields that admission adds to a request's `slos:req:{id}` hash, beside those of the request's life."""

from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis

from services.common import keys
from services.common.broker import broker_errors

__all__ = ["RecordNotes"]

# Stores fields of a hash that exists: an expired request must not come back as a stub.
_AMEND = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV))
return 1
"""


class RecordNotes:
    """Writes and reads such fields. SloServeError BROKER_UNAVAILABLE while Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self._command: Callable[..., Awaitable[Any]] = redis.execute_command

    async def write(self, request_id: str, **fields: str | bytes | float) -> None:
        """Store fields, unless the request is gone."""
        flat = [part for item in fields.items() for part in item]
        with broker_errors():
            await self._command("EVAL", _AMEND, 1, keys.request_key(request_id), *flat)

    async def read(self, request_id: str, *names: str) -> list[bytes | None]:
        """The fields by name; None for each that is not there."""
        with broker_errors():
            found: list[bytes | None] = await self._command("HMGET", keys.request_key(request_id), *names)
        return found
