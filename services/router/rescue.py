"""A request whose replica was lost, on its way to another one."""

import logging
from collections.abc import Sequence

from protos import router_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import FieldViolation, InvalidRequestError, Reason, SloServeError
from services.common.request_record import RequestRecord, RequestState
from services.common.request_store import RequestHeldError, RequestStore
from services.router.candidate import current_stage
from services.router.fleet import Fleet
from services.router.joined import joined
from services.router.place import Placer

__all__ = ["Rescuer"]

_log = logging.getLogger(__name__)


class Rescuer:
    """Places requests again. The append of the next attempt is what fences off the lost one.

    `max_losses`: a request under which so many workers died is what kills them, and fails.
    """

    def __init__(self, *, store: RequestStore, fleet: Fleet, placer: Placer, clock: Clock, max_losses: int) -> None:
        self._store = store
        self._fleet = fleet
        self._placer = placer
        self._clock = clock
        self._max_losses = max_losses

    async def replace(self, asked: router_pb2.ReplaceRequest) -> router_pb2.PlaceResponse:
        """Place the attempt after `asked.attempt`, to continue after the tokens already delivered.

        Where a later attempt is in force (a repeated call, another worker that took over), that one is the answer.
        Raises SloServeError: REQUEST_UNKNOWN, REQUEST_CANCELLED, WORKER_LOST where it had finished on the lost replica,
        ENGINE_FAILED where it failed or has killed too many workers, REQUEST_CONFLICT where its worker is alive after
        all, NO_REPLICA, BROKER_UNAVAILABLE.
        """
        record = await self._store.get(asked.request_id)
        if record is None or record.attempt < asked.attempt:
            raise SloServeError(Reason.REQUEST_UNKNOWN, f"attempt {asked.attempt} of {asked.request_id} is not known")
        if record.state.ended:
            raise _ended(record)
        queued = await self._store.queued_request(record)
        if queued is None:
            raise SloServeError(Reason.WORKER_LOST, f"the queue entry of {asked.request_id} is gone")
        if record.attempt > asked.attempt:
            return joined(record, current_stage(queued), self._clock.now_us())
        held = record.state in (RequestState.CLAIMED, RequestState.RUNNING)
        if held and record.losses + 1 >= self._max_losses:
            raise await self._give_up(record, asked.reason)
        again = next_attempt(queued, record, asked.delivered_token_ids)
        await self._fleet.refresh()
        _log.info("request %s is placed again as attempt %d: %s", again.request_id, again.attempt, asked.reason)
        return await self._placer.place_again(again, record.replica_id)

    async def _give_up(self, record: RequestRecord, reason: str) -> SloServeError:
        text = f"took {record.losses + 1} workers along: {reason}"
        buried = await self._store.bury(
            record.request_id,
            stream=record.stream,
            entry_id=record.entry_id,
            reason=text,
            deliveries=record.attempt,
        )
        if not buried and (now := await self._store.get(record.request_id)) is not None:
            return _ended(now) if now.state.ended else RequestHeldError(now.request_id, now.owner)
        return SloServeError(Reason.ENGINE_FAILED, f"request {record.request_id} {text}")


def next_attempt(
    queued: types_pb2.QueuedRequest, record: RequestRecord, delivered: Sequence[int]
) -> types_pb2.QueuedRequest:
    """The request as its next attempt. `delivered` is its whole output as the caller has it, earlier attempts included.

    A worker that handed the request on may have put more into the entry than the caller has received: the longer one
    is continued, and the next worker sends what is missing.
    """
    before = list(queued.delivered_token_ids)
    shared = min(len(before), len(delivered))
    if list(delivered[:shared]) != before[:shared]:
        text = "must be the whole output so far; it contradicts what earlier attempts delivered"
        raise InvalidRequestError(FieldViolation("delivered_token_ids", text))
    output = max(before, list(delivered), key=len)
    again = types_pb2.QueuedRequest()
    again.CopyFrom(queued)
    again.attempt = record.attempt + 1
    again.delivered_token_ids[:] = output
    again.admission_id = record.admission_id or queued.admission_id  # another process may serve its client by now
    if output and not again.HasField("first_token_us") and record.times_us.get("first_token_us"):
        again.first_token_us = record.times_us["first_token_us"]
    return again


def _ended(record: RequestRecord) -> SloServeError:
    if record.state is RequestState.FINISHED:
        text = f"request {record.request_id} finished on {record.replica_id}, which took the rest of its output along"
        return SloServeError(Reason.WORKER_LOST, text)
    if record.state is RequestState.FAILED:
        return SloServeError(Reason.ENGINE_FAILED, record.fields.get("error") or f"request {record.request_id} failed")
    return SloServeError(Reason.REQUEST_CANCELLED, f"request {record.request_id} was cancelled")
