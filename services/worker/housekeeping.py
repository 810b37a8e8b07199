"""What a worker does every second: forget old output, stop what nobody listens to, keep its queue entries its own."""

import asyncio
import logging

from redis.exceptions import RedisError

from services.common.errors import SloServeError
from services.common.stream_reader import StreamReader
from services.worker.generations import Generations
from services.worker.intake import Intake
from services.worker.outbox import Outbox

__all__ = ["Housekeeping"]

_log = logging.getLogger(__name__)

_ROUND_S = 1.0
_KEEP_ALIVE_EVERY = 5  # rounds; well within the time after which another consumer takes an entry over


class Housekeeping:
    """One task, `run`."""

    def __init__(self, outbox: Outbox, generations: Generations, intake: Intake, reader: StreamReader) -> None:
        self._outbox = outbox
        self._generations = generations
        self._intake = intake
        self._reader = reader

    async def run(self) -> None:
        """Tidy until cancelled."""
        rounds = 0
        while True:
            await asyncio.sleep(_ROUND_S)
            rounds += 1
            await self.tidy()
            if rounds % _KEEP_ALIVE_EVERY == 0:
                await self.keep_alive()

    async def tidy(self) -> None:
        """Forget output past its retention and cancel requests whose output nobody asks for."""
        for request_id in self._outbox.sweep():
            _log.warning("request %s is cancelled: no admission process has asked for its output", request_id)
            await self._generations.cancel(request_id, 0, "nobody listens")

    async def keep_alive(self) -> None:
        """Refresh the idle time of every entry this worker holds, so that a long generation is never run twice."""
        try:
            for stream, entry_ids in self._intake.entries.items():
                await self._reader.keep_alive(stream, entry_ids)
        except (RedisError, SloServeError) as error:
            _log.warning("queue entries are not refreshed: %s", error)
