"""This admission process's sign of life in Redis: while it stands, its requests are its own to rescue."""

import asyncio
import logging

from redis.asyncio import Redis

from services.common import keys
from services.common.broker import command
from services.common.errors import SloServeError

__all__ = ["LEASE_S", "Presence"]

_log = logging.getLogger(__name__)

LEASE_S = 10.0
_RENEW_S = 2.0


class Presence:
    """Holds `slos:admission:{id}`."""

    def __init__(self, redis: Redis, admission_id: str, lease_s: float = LEASE_S) -> None:
        self._redis = redis
        self._key = keys.admission_key(admission_id)
        self._lease_ms = round(lease_s * 1000)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take the lease and keep it. Raises SloServeError while Redis is away."""
        await self._renew()
        self._task = asyncio.create_task(self._keep(), name="presence")

    async def stop(self) -> None:
        """Give the lease up."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        try:
            await command(self._redis, "DEL", self._key)
        except SloServeError as error:  # it runs out by itself
            _log.info("the lease of this process is not given up: %s", error)

    async def _renew(self) -> None:
        await command(self._redis, "SET", self._key, "1", "PX", self._lease_ms)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                await self._renew()
            except SloServeError as error:
                _log.warning("the lease of this process cannot be renewed: %s", error)
