"""The truth about every request: one hash each, changed only by scripts that compare the attempt.

A life: `begin` (new) -> `enqueue` (queued) -> `claim` (claimed) -> `mark` (running) -> `finish`; `cancel` from
anywhere. Placing a request again is an `enqueue` of the next attempt: in one step it appends the new entry, removes
the old one and fences off the old owner, so nothing is lost in between. Every call may be repeated.

All methods raise SloServeError BROKER_UNAVAILABLE (with a retry delay) while Redis is away.
"""

from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis

from protos import types_pb2
from services.common import keys
from services.common.broker import broker_errors, command
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.lua_scripts import load_script
from services.common.request_record import (
    BeginResult,
    CancelResult,
    Enqueued,
    RequestRecord,
    RequestState,
    record_from_fields,
)
from services.common.stream_entry import decode_entry, encode_entry

__all__ = [
    "KEEP_ENDED_S",
    "QueueFullError",
    "RequestEndedError",
    "RequestHeldError",
    "RequestStore",
    "StaleAttemptError",
]

KEEP_ENDED_S = 600
KEEP_UNQUEUED_S = 3600  # a request whose admission process died before queueing it


class StaleAttemptError(SloServeError):
    """A later attempt is in force: this one must be forgotten."""

    def __init__(self, request_id: str, attempt: int, current: int) -> None:
        super().__init__(
            Reason.REQUEST_CONFLICT, f"request {request_id}: attempt {attempt} is stale, {current} is in force"
        )
        self.current = current


class RequestEndedError(SloServeError):
    """The request has finished, failed or been cancelled meanwhile."""

    def __init__(self, request_id: str, state: RequestState) -> None:
        super().__init__(Reason.REQUEST_CANCELLED, f"request {request_id} is {state}")
        self.state = state


class RequestHeldError(SloServeError):
    """A live worker runs the request: only that one may hand it on."""

    def __init__(self, request_id: str, owner: str) -> None:
        super().__init__(Reason.REQUEST_CONFLICT, f"request {request_id} runs on {owner}, which is alive")
        self.owner = owner


class QueueFullError(SloServeError):
    """The queue holds as many unread entries as its limit allows."""

    def __init__(self, stream: str, waiting: int, limit: int) -> None:
        super().__init__(
            Reason.NO_CAPACITY, f"queue {stream} is full: {waiting} waiting, limit {limit}", retry_after_ms=1000.0
        )


def _flat(fields: Mapping[str, object]) -> list[Any]:
    flat: list[Any] = []
    for name, value in fields.items():
        flat += (name, value if isinstance(value, bytes) else str(value))
    return flat


class RequestStore:
    """Requests in Redis. `owner` is `keys.owner_name(replica_id, started_us)` of a worker process."""

    def __init__(self, redis: Redis, clock: Clock | None = None) -> None:
        self._redis = redis
        self._clock = clock or Clock()
        self._begin = load_script(redis, "begin")
        self._enqueue = load_script(redis, "enqueue", "owner_alive")
        self._claim = load_script(redis, "claim", "owner_alive")
        self._mark = load_script(redis, "mark")
        self._finish = load_script(redis, "finish")
        self._cancel = load_script(redis, "cancel")
        self._bury = load_script(redis, "bury", "owner_alive")

    async def begin(
        self,
        request_id: str,
        *,
        digest: str,
        admission_id: str,
        tenant: str,
        application: str,
        arrival_us: int,
        traceparent: str = "",
    ) -> BeginResult:
        """Register an id. `digest` is of everything the client sent: an id with another digest or tenant conflicts."""
        fields = {"admission": admission_id, "app": application, "arrival_us": arrival_us, "traceparent": traceparent}
        with broker_errors():
            outcome = await self._begin(
                [keys.request_key(request_id)], [digest, tenant, KEEP_UNQUEUED_S, *_flat(fields)]
            )
        return BeginResult(outcome.decode())

    async def enqueue(
        self,
        request: types_pb2.QueuedRequest,
        stream: str,
        *,
        verdict: str,
        replica_id: str = "",
        hops: int = 0,
        queue_limit: int | None = None,
        giver: str = "",
    ) -> Enqueued:
        """Append `request.attempt` to `stream`; returns once Redis has acknowledged it.

        An attempt that was appended before is not appended again (see `Enqueued.fresh`). Attempt n+1 replaces
        attempt n, unless a live worker holds that: then it takes its own word, as `giver`. Raises RequestHeldError,
        StaleAttemptError, RequestEndedError (cancelled meanwhile), QueueFullError where `queue_limit` unread entries
        wait, SloServeError REQUEST_UNKNOWN for a later attempt of nothing.
        """
        entry = _flat(encode_entry(request))
        fields = {
            "tier": request.tier,
            "replica": replica_id,
            "verdict": verdict,
            "hops": hops,
            "admission": request.admission_id,
            "tenant": request.tenant,
            "app": request.application,
            "arrival_us": request.arrival_us,
            "ttft_deadline_us": request.ttft_deadline_us,
            "traceparent": request.traceparent,
            "queued_us": self._clock.now_us(),
            "grace_us": request.resume_grace_us,
        }
        limit = -1 if queue_limit is None else queue_limit
        with broker_errors():
            reply = await self._enqueue(
                [keys.request_key(request.request_id), stream, keys.QUEUE_INDEX],
                [request.attempt, limit, keys.GROUP, giver, keys.REPLICA_PREFIX, len(entry), *entry, *_flat(fields)],
            )
        outcome, *rest = (part.decode() for part in reply)
        if outcome in ("OK", "SAME"):
            return Enqueued(rest[0], rest[1], fresh=outcome == "OK")
        if outcome == "STALE":
            raise StaleAttemptError(request.request_id, request.attempt, int(rest[0]))
        if outcome == "ENDED":
            raise RequestEndedError(request.request_id, RequestState(rest[0]))
        if outcome == "HELD":
            raise RequestHeldError(request.request_id, rest[0])
        if outcome == "FULL":
            raise QueueFullError(stream, int(rest[0]), limit)
        raise SloServeError(Reason.REQUEST_UNKNOWN, f"request {request.request_id} is not known")

    async def claim(self, request_id: str, attempt: int, owner: str, *, stream: str, entry_id: str) -> int | None:
        """Take an attempt that was read from a queue; the attempt in force, or 0 where it is not this owner's to run.

        The number is `attempt`, or one more where a worker that died before the first token had claimed it: use the
        returned one from here on. With 0 the entry has been acknowledged. None: this owner's own lease is gone; the
        entry is left as it is. A claim repeated by its own owner before `mark` succeeds again, so a worker looks
        first whether it already holds the request.
        """
        replica_id = owner.rpartition("/")[0] or owner
        with broker_errors():
            outcome = int(
                await self._claim(
                    [keys.request_key(request_id), stream],
                    [attempt, owner, replica_id, keys.REPLICA_PREFIX, self._clock.now_us(), entry_id, keys.GROUP],
                )
            )
        return None if outcome < 0 else outcome

    async def mark(
        self, request_id: str, attempt: int, owner: str, state: RequestState = RequestState.RUNNING, **fields: object
    ) -> bool:
        """Record progress (`running`, with fields such as `first_token_us`).

        False: this owner no longer holds this attempt, or the request was cancelled; abort it.
        """
        if state not in (RequestState.CLAIMED, RequestState.RUNNING):
            raise ValueError(f"mark takes claimed or running, not {state}: use finish")
        with broker_errors():
            return bool(await self._mark([keys.request_key(request_id)], [attempt, owner, state, *_flat(fields)]))

    async def finish(
        self,
        request_id: str,
        attempt: int,
        owner: str,
        state: RequestState,
        *,
        stream: str,
        entry_id: str,
        fields: Mapping[str, object] | None = None,
    ) -> bool:
        """End an attempt: state, expiry of the hash, acknowledgement and removal of the queue entry, all at once.

        False: somebody else holds the request now and nothing was touched. A worker that gives a request up for
        another one must not finish it: its entry is what it is placed again from.
        """
        if not state.ended:
            raise ValueError(f"{state} is no end")
        stored = {"ended_us": self._clock.now_us(), **(fields or {})}
        with broker_errors():
            return bool(
                await self._finish(
                    [keys.request_key(request_id), stream],
                    [attempt, owner, state, entry_id, keys.GROUP, KEEP_ENDED_S, *_flat(stored)],
                )
            )

    async def cancel(self, request_id: str) -> CancelResult:
        """End a request from outside. Its queue entry goes at once; the worker of a claimed one is to be told."""
        with broker_errors():
            reply = await self._cancel([keys.request_key(request_id)], [keys.GROUP, KEEP_ENDED_S, self._clock.now_us()])
        if not reply:
            return CancelResult(None)
        state, replica_id, attempt, owner = (part.decode() for part in reply)
        return CancelResult(RequestState(state), replica_id, int(attempt), owner)

    async def bury(self, request_id: str, *, stream: str, entry_id: str, reason: str, deliveries: int) -> bool:
        """Move an entry to the dead letters; True where the request failed by it.

        A request that has been queued again meanwhile is not touched, one that a live owner holds keeps its entry.
        """
        now_us = self._clock.now_us()
        with broker_errors():
            outcome = await self._bury(
                [keys.request_key(request_id), stream, keys.DEAD_LETTERS],
                [entry_id, keys.GROUP, KEEP_ENDED_S, now_us, reason, deliveries, keys.REPLICA_PREFIX],
            )
        return int(outcome) == 1

    async def get(self, request_id: str) -> RequestRecord | None:
        """What is known about a request; None for an unknown or long ended one."""
        raw: dict[bytes, bytes] = await command(self._redis, "HGETALL", keys.request_key(request_id))
        return record_from_fields(request_id, raw) if raw else None

    async def queued_request(self, record: RequestRecord) -> types_pb2.QueuedRequest | None:
        """The request as it was queued for its current attempt; None once its entry is gone."""
        if not record.entry_id:
            return None
        found = await command(self._redis, "XRANGE", record.stream, record.entry_id, record.entry_id)
        return decode_entry(found[0][1]) if found else None
