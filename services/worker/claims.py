"""This worker's hold on requests in Redis: take, prove, give back, end. Bound to one owner.

Claims and ends are retried for as long as Redis is away: a run that nobody recorded would run again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from protos import types_pb2
from services.common.errors import Reason, SloServeError
from services.common.keys import BEST_EFFORT_QUEUE
from services.common.request_record import RequestState
from services.common.request_store import RequestStore
from services.common.stream_reader import Delivery
from services.core.slo import BEST_EFFORT

__all__ = ["Claimed", "Claims"]

_log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.05
_LAST_RETRY_S = 2.0
_NO_LEASE_RETRY_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Claimed:
    """A request this worker holds. `request.attempt` is the attempt in force; the entry goes at its end."""

    request: types_pb2.QueuedRequest
    stream: str
    entry_id: str

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def attempt(self) -> int:
        """The attempt in force."""
        return self.request.attempt

    @property
    def queued_us(self) -> int:
        """When the entry was appended, by Redis's clock."""
        return int(self.entry_id.partition("-")[0]) * 1000


class Claims:
    """Requests in Redis as seen by one owner (`keys.owner_name` of this process)."""

    def __init__(self, store: RequestStore, owner: str) -> None:
        self._store = store
        self._owner = owner

    @property
    def owner(self) -> str:
        """Name of this owner, and of its consumer in the group."""
        return self._owner

    async def claim(self, delivery: Delivery) -> Claimed | None:
        """Take what was delivered; None where it is not ours to run: then the entry is acknowledged and forgotten.

        Waits for Redis, and for this worker's lease where that has run out: an entry let go now would be delivered
        again only later.
        """
        request = delivery.request
        while True:
            attempt = await _when_served(
                f"the claim of {request.request_id}",
                lambda: self._store.claim(
                    request.request_id,
                    request.attempt,
                    self._owner,
                    stream=delivery.stream,
                    entry_id=delivery.entry_id,
                ),
            )
            if attempt is not None:
                break
            await asyncio.sleep(_NO_LEASE_RETRY_S)
        if not attempt:
            return None
        request.attempt = attempt
        return Claimed(request, delivery.stream, delivery.entry_id)

    async def running(self, claimed: Claimed, first_token_us: int) -> bool:
        """Record the first token. False: no longer ours, or cancelled; abort it."""
        return await self._store.mark(claimed.request_id, claimed.attempt, self._owner, first_token_us=first_token_us)

    async def promoted(self, claimed: Claimed, tier: str, *, started: bool) -> bool:
        """Record that it is promised now."""
        state = RequestState.RUNNING if started else RequestState.CLAIMED
        return await self._store.mark(
            claimed.request_id, claimed.attempt, self._owner, state, tier=tier, verdict="admitted"
        )

    async def demoted(self, claimed: Claimed, *, started: bool) -> bool:
        """Record that it is best effort now."""
        state = RequestState.RUNNING if started else RequestState.CLAIMED
        return await self._store.mark(
            claimed.request_id, claimed.attempt, self._owner, state, tier=BEST_EFFORT, verdict="best_effort"
        )

    async def still_ours(self, claimed: Claimed) -> bool:
        """Whether Redis still names this owner and attempt and the request has not ended."""
        record = await self._store.get(claimed.request_id)
        return (
            record is not None
            and not record.state.ended
            and record.attempt == claimed.attempt
            and record.owner == self._owner
        )

    async def end(self, claimed: Claimed, state: RequestState, fields: Mapping[str, object] | None = None) -> bool:
        """End the request, acknowledge and delete its entry; waits for Redis. False: it was not ours any more."""
        return await _when_served(
            f"the end of {claimed.request_id}",
            lambda: self._store.finish(
                claimed.request_id,
                claimed.attempt,
                self._owner,
                state,
                stream=claimed.stream,
                entry_id=claimed.entry_id,
                fields=fields,
            ),
        )

    async def hand_back(
        self,
        claimed: Claimed,
        output_ids: Iterable[int] = (),
        first_token_us: int | None = None,
        *,
        pending: bool = False,
    ) -> bool:
        """Put a request into the shared best-effort queue as its next attempt; `output_ids` are delivered already.

        `pending`: its client waits for a verdict still, which whoever takes it gives.

        False where it has ended, or a later attempt is in force: then there was nothing to give.
        """
        again = types_pb2.QueuedRequest()
        again.CopyFrom(claimed.request)
        again.attempt += 1
        again.tier, again.promised, again.pending = BEST_EFFORT, False, pending
        again.delivered_token_ids[:] = output_ids
        if first_token_us is not None:
            again.first_token_us = first_token_us
        try:
            await self._store.enqueue(again, BEST_EFFORT_QUEUE, verdict="best_effort", giver=self._owner)
        except SloServeError as error:
            if error.reason is Reason.BROKER_UNAVAILABLE:
                raise
            _log.info("not handed back: %s", error)
            return False
        return True


async def _when_served(what: str, call: Callable[[], Awaitable[T]]) -> T:
    delay_s = _FIRST_RETRY_S
    while True:
        try:
            return await call()
        except SloServeError as error:
            if error.reason is not Reason.BROKER_UNAVAILABLE:
                raise
            _log.warning("%s is not recorded yet: %s", what, error)
        await asyncio.sleep(delay_s)
        delay_s = min(_LAST_RETRY_S, 2 * delay_s)
