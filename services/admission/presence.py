"""This admission process's sign of life in Redis: while it stands, its requests are its own to rescue."""

import asyncio
import logging

from redis.asyncio import Redis

from services.common import keys
from services.common.broker import command
from services.common.errors import SloServeError
from services.common.kept import KeptTasks

__all__ = ["LEASE_S", "Presence"]

_log = logging.getLogger(__name__)

LEASE_S = 10.0
_RENEW_S = 2.0
_TASK = "presence"


class Presence:
    """Holds `slos:admission:{id}`."""

    def __init__(self, redis: Redis, admission_id: str, tasks: KeptTasks, lease_s: float = LEASE_S) -> None:
        self._redis = redis
        self._key = keys.admission_key(admission_id)
        self._lease_ms = round(lease_s * 1000)
        self._tasks = tasks
        self._held = False

    async def start(self) -> None:
        """Take the lease and keep it. Raises SloServeError while Redis is away."""
        await self._renew()
        self._held = True
        self._tasks.keep(_TASK, self._keep)

    async def stop(self) -> None:
        """Give the lease up."""
        if not self._held:
            return
        await self._tasks.cancel(_TASK)
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
