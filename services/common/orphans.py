"""What Redis says about requests nobody cares for: the queries of the router's sweep, and the lock that guards it."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from services.common import keys
from services.common.broker import broker_errors, command
from services.common.lua_scripts import load_script

__all__ = ["ExpiringLock", "Orphan", "OrphanFinder"]

_PAGE = 200  # entries looked at in one step of Redis, a millisecond or two
_PAGES = 10  # of one queue in a round
_START = "-"
_REQUEST_PREFIX = keys.request_key("")


@dataclass(frozen=True, slots=True)
class Orphan:
    """A queued or taken request in want of somebody.

    `lost`: no live worker holds it or will read it. `heard`: the admission process of its client is alive. `grace_s`:
    how long it is to run on without that.
    """

    request_id: str
    attempt: int
    lost: bool
    heard: bool
    grace_s: float


class OrphanFinder:
    """Walks all queues, a few pages of each per round; entries that no request stands on are deleted on the way."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._orphans = load_script(redis, "orphans", "owner_alive")
        self._next: dict[str, str] = {}

    async def round(self) -> Sequence[Orphan]:
        """The orphans on the next pages of every queue. Raises SloServeError while Redis is away."""
        found: list[Orphan] = []
        streams = [name.decode() for name in await command(self._redis, "SMEMBERS", keys.QUEUE_INDEX)]
        for stream in streams:
            for _ in range(_PAGES):
                found += await self._page(stream)
                if self._next[stream] == _START:
                    break
        self._next = {stream: self._next[stream] for stream in streams}
        return found

    async def _page(self, stream: str) -> list[Orphan]:
        prefixes = (_REQUEST_PREFIX, keys.REPLICA_PREFIX, keys.ADMISSION_PREFIX)
        with broker_errors():
            after, _, rows = await self._orphans(
                [stream, keys.QUEUE_INDEX], [self._next.get(stream, _START), _PAGE, keys.GROUP, *prefixes]
            )
        self._next[stream] = after.decode() or _START
        return [
            Orphan(request_id.decode(), int(attempt), kind == b"LOST", bool(heard), int(grace_us) / 1e6)
            for request_id, attempt, kind, heard, grace_us in rows
        ]


class ExpiringLock:
    """At most one holder at a time; one that dies loses it after `lease_s`."""

    def __init__(self, redis: Redis, key: str, holder: str, lease_s: float) -> None:
        self._hold = load_script(redis, "hold")
        self._key = key
        self._holder = holder
        self._lease_ms = round(lease_s * 1000)

    async def hold(self) -> bool:
        """Take it or keep it; False where another one has it. Raises SloServeError while Redis is away."""
        with broker_errors():
            return bool(await self._hold([self._key], [self._holder, self._lease_ms]))
