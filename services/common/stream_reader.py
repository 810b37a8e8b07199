"""Reads queues in the consumer group as an async iterator of deliveries, each with its own `ack()`.

An entry stays pending until it is acknowledged. Entries of consumers that stopped refreshing theirs are taken over
(XAUTOCLAIM, its cursor followed to the end); an entry that was delivered too often, or that is no request, goes to the
dead letters. The iterator outlives a lost Redis: it waits and goes on. A reply that was lost on the way leaves entries
pending for this consumer of which it knows nothing: they are looked for and delivered again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from protos import types_pb2
from services.common import keys
from services.common.broker import command
from services.common.errors import SloServeError
from services.common.lua_scripts import load_script
from services.common.request_store import RequestStore
from services.common.stream_entry import MalformedEntryError, decode_entry

__all__ = ["Delivery", "StreamReader"]

_log = logging.getLogger(__name__)

_BATCH = 16
_OUTAGE_DELAY_S = 0.5
_MOST_LOST = 10_000  # pending entries of one consumer looked through for lost ones

Entry = tuple[str, str, dict[bytes, bytes]]  # stream, entry id, fields


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry handed to this consumer. `deliveries` counts how often it was handed to anybody."""

    stream: str
    entry_id: str
    request: types_pb2.QueuedRequest
    deliveries: int
    _ack: Callable[[str, str], Awaitable[None]] = field(repr=False, compare=False)

    async def ack(self) -> None:
        """Acknowledge without running it (a failed claim). The end of a run acknowledges through `finish`."""
        await self._ack(self.stream, self.entry_id)


class StreamReader:
    """One consumer of the group. `consumer` is the owner name of this process."""

    def __init__(
        self,
        redis: Redis,
        consumer: str,
        *,
        block_ms: int = 100,
        stale_ms: int = 30_000,
        reclaim_every_s: float = 5.0,
        recover_every_s: float = 1.0,
        max_deliveries: int = 3,
        forget_consumers_ms: int = 600_000,
        on_dead: Callable[[types_pb2.QueuedRequest, str], Awaitable[None]] | None = None,
        held: Callable[[], Mapping[str, Collection[str]]] | None = None,
    ) -> None:
        """`stale_ms` is how long an entry may go without `keep_alive` before another consumer takes it.

        A consumer silent for `forget_consumers_ms` that holds nothing is dropped from the group.
        `on_dead(request, reason)` is awaited for a request that failed because of too many deliveries.
        `held()` names the entries this consumer works on, by stream; without it lost replies are not looked for.
        """
        self._redis = redis
        self._store = RequestStore(redis)
        self._forget_consumers = load_script(redis, "forget_consumers")
        self._consumer = consumer
        self._block_ms = block_ms
        self._stale_ms = stale_ms
        self._reclaim_every_s = reclaim_every_s
        self._max_deliveries = max_deliveries
        self._forget_consumers_ms = forget_consumers_ms
        self._on_dead = on_dead
        self._held = held
        self._recover_every_s = recover_every_s

    async def ensure_groups(self, streams: Sequence[str]) -> None:
        """Create the streams and their group, from the first entry on. Existing ones are left alone."""
        for stream in streams:
            try:
                await command(self._redis, "XGROUP", "CREATE", stream, keys.GROUP, "0", "MKSTREAM")
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise

    async def deliveries(self, streams: Callable[[], Sequence[str]]) -> AsyncIterator[Delivery]:
        """Entries as they come. `streams()` is asked before every read which queues to read now.

        Leave the best-effort queue out where there is no capacity left for it: with it, entries are read one by one.
        The queues of one replica have one reader, so at the first look whatever is pending there is taken over at
        once; publish the replica's lease before.
        """
        ready: set[str] = set()
        taken_over: set[str] = set()
        reclaim_at_s = recover_at_s = 0.0
        while True:
            wanted = list(streams())
            try:
                for stream in wanted:
                    if stream not in ready:
                        await self.ensure_groups([stream])
                        ready.add(stream)
                    if stream not in taken_over and stream != keys.BEST_EFFORT_QUEUE:
                        taken_over.add(stream)
                        async for delivery in self._reclaim(stream, 0):
                            yield delivery
                if time.monotonic() >= reclaim_at_s:
                    for stream in wanted:
                        async for delivery in self._reclaim(stream, self._stale_ms):
                            yield delivery
                        await self._forget_consumers([stream], [keys.GROUP, self._consumer, self._forget_consumers_ms])
                    reclaim_at_s = time.monotonic() + self._reclaim_every_s
                if self._held is not None and time.monotonic() >= recover_at_s:
                    async for delivery in self.recover(wanted):
                        yield delivery
                    recover_at_s = time.monotonic() + self._recover_every_s
                for entry in await self._read(wanted):
                    fresh = await self._deliver(entry, 1)
                    if fresh is not None:
                        yield fresh
            except (RedisError, OSError, SloServeError) as error:
                _log.warning("queues cannot be read, trying again: %s", error)
                ready.clear()  # Redis may have come back without the groups
                await asyncio.sleep(_OUTAGE_DELAY_S)

    async def keep_alive(self, stream: str, entry_ids: Sequence[str]) -> None:
        """Refresh the idle time of entries this consumer holds, so that nobody takes them over."""
        if not entry_ids:
            return
        await command(
            self._redis, "XCLAIM", stream, keys.GROUP, self._consumer, 0, *entry_ids, "JUSTID", parse_justid=True
        )

    async def _read(self, streams: Sequence[str]) -> list[Entry]:
        if not streams:
            await asyncio.sleep(self._block_ms / 1000)
            return []
        count = 1 if keys.BEST_EFFORT_QUEUE in streams else _BATCH
        replies: list[Any] = await command(
            self._redis,
            *("XREADGROUP", "GROUP", keys.GROUP, self._consumer, "COUNT", count, "BLOCK", self._block_ms),
            *("STREAMS", *streams, *(">" for _ in streams)),
        )
        return [
            (stream.decode(), entry_id.decode(), fields)
            for stream, entries in replies
            for entry_id, fields in entries
            if entry_id is not None
        ]

    async def _reclaim(self, stream: str, min_idle_ms: int) -> AsyncIterator[Delivery]:
        cursor = b"0-0"
        while True:
            reply = await command(
                self._redis, "XAUTOCLAIM", stream, keys.GROUP, self._consumer, min_idle_ms, cursor, "COUNT", _BATCH
            )
            cursor, entries = reply[0], reply[1]  # Redis 7 adds a third part: ids that were deleted
            for entry_id, fields in entries:
                if entry_id is None or fields is None:  # Redis 6.2 returns nothing in place of a deleted entry
                    continue
                count = await self._times_delivered(stream, entry_id)
                delivery = await self._deliver((stream, entry_id.decode(), fields), count)
                if delivery is not None:
                    yield delivery
            if cursor == b"0-0":
                return

    async def recover(self, streams: Sequence[str]) -> AsyncIterator[Delivery]:
        """What Redis gave this consumer and it does not have: the reply never came."""
        for stream in streams:
            rows: list[dict[str, Any]] = await command(
                *(self._redis, "XPENDING", stream, keys.GROUP, "-", "+", _MOST_LOST, self._consumer), parse_detail=True
            )
            held = set(self._held().get(stream, ()) if self._held is not None else ())
            for row in rows:
                entry_id = row["message_id"].decode()
                if entry_id in held:
                    continue
                found = await command(self._redis, "XRANGE", stream, entry_id, entry_id)
                if not found:  # it was deleted
                    await self._ack(stream, entry_id)
                    continue
                _log.warning("entry %s of %s is delivered again: the reply with it was lost", entry_id, stream)
                delivery = await self._deliver((stream, entry_id, found[0][1]), int(row["times_delivered"]))
                if delivery is not None:
                    yield delivery

    async def _times_delivered(self, stream: str, entry_id: bytes) -> int:
        rows = await command(self._redis, "XPENDING", stream, keys.GROUP, entry_id, entry_id, 1, parse_detail=True)
        return int(rows[0]["times_delivered"]) if rows else 1

    async def _deliver(self, entry: Entry, deliveries: int) -> Delivery | None:
        stream, entry_id, fields = entry
        try:
            request = decode_entry(fields)
        except MalformedEntryError as error:
            request_id = fields.get(b"id", b"").decode("utf-8", "replace")
            await self._bury(request_id, entry, f"malformed: {error}", deliveries)
            return None
        if deliveries > self._max_deliveries:
            reason = f"not run after {self._max_deliveries} deliveries"
            if await self._bury(request.request_id, entry, reason, deliveries) and self._on_dead is not None:
                await self._on_dead(request, reason)
            return None
        return Delivery(stream, entry_id, request, deliveries, self._ack)

    async def _bury(self, request_id: str, entry: Entry, reason: str, deliveries: int) -> bool:
        stream, entry_id, _ = entry
        buried = await self._store.bury(
            request_id, stream=stream, entry_id=entry_id, reason=reason, deliveries=deliveries
        )
        if buried:
            _log.error("request %s in %s went to the dead letters: %s", request_id, stream, reason)
        return buried

    async def _ack(self, stream: str, entry_id: str) -> None:
        await command(self._redis, "XACK", stream, keys.GROUP, entry_id)
