"""Ending requests before they are done: by their client, by its absence, or because they never got a place."""

import asyncio
import logging

from protos import types_pb2
from services.admission.background import Background
from services.admission.handover import Handover
from services.admission.session import Session
from services.admission.sessions import Sessions
from services.admission.workers import Workers
from services.common.errors import Reason, SloServeError
from services.common.request_record import RequestState
from services.common.request_store import RequestStore

__all__ = ["Endings", "unknown_request"]

_log = logging.getLogger(__name__)

_RETRY_DELAYS_S = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
_MAYBE_QUEUED = (Reason.ROUTER_UNAVAILABLE, Reason.CLIENT_DEADLINE, Reason.BROKER_UNAVAILABLE, Reason.INTERNAL)
"""After these errors of a placement the request may be in a queue all the same."""


class Endings:
    """Cancels in Redis and at the worker at once: the KV blocks are free within an engine step."""

    def __init__(
        self,
        store: RequestStore,
        sessions: Sessions,
        workers: Workers,
        handover: Handover,
        background: Background,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._workers = workers
        self._handover = handover
        self._background = background

    async def cancel(self, request_id: str, tenant: str) -> bool:
        """A client's own cancel, of a request served here or elsewhere. False where it had already ended."""
        session = self._sessions.get(request_id)
        if session is not None:
            if session.facts.queued.tenant != tenant:
                raise unknown_request(request_id)
            if session.state.ended:
                return False
            session.end(types_pb2.FINISH_REASON_CANCELLED)
            await self._cancel(request_id, session.replica_id, "client")
            return True
        record = await self._store.get(request_id)
        if record is None or record.tenant != tenant:
            raise unknown_request(request_id)
        if record.state.ended:
            return False
        await self._cancel(request_id, record.replica_id, "client")
        return True

    def give_up(self, session: Session) -> None:
        """Nobody waits for this request any more."""
        session.end(types_pb2.FINISH_REASON_CANCELLED)
        work = self._cancel_surely(session.request_id, session.replica_id)
        self._background.start(work, f"cancel of {session.request_id}")
        self._sessions.drop(session)

    def abandon(self, session: Session) -> None:
        """Its grace ran out: give it up, unless another process serves it now."""
        if session.facts.resume_grace_s > 0:
            self._background.start(self._abandon(session), f"giving up {session.request_id}")
        else:
            self.give_up(session)

    def not_placed(self, session: Session, error: SloServeError) -> None:
        """Its placement failed. It may be retried under its id, unless it is in a queue after all."""
        if error.reason in _MAYBE_QUEUED:
            work = self._cancel_surely(session.request_id, session.replica_id, keep_new=True)
            self._background.start(work, f"cancel of {session.request_id}")

    async def _abandon(self, session: Session) -> None:
        if await self._handover.is_mine(session.request_id):
            self.give_up(session)
        else:
            self._sessions.drop(session)

    async def _cancel_surely(self, request_id: str, replica_id: str, *, keep_new: bool = False) -> None:
        """Cancel even if Redis is away for a while. `keep_new`: unless the request was never queued."""
        for delay_s in _RETRY_DELAYS_S:
            try:
                if keep_new:
                    record = await self._store.get(request_id)
                    if record is None or record.state is RequestState.NEW:
                        return
                await self._cancel(request_id, replica_id, "client gone")
                return
            except SloServeError as error:
                _log.warning("cancel of %s: %s; trying again in %g s", request_id, error, delay_s)
                await asyncio.sleep(delay_s)
        _log.error("cancel of %s given up: Redis stayed away", request_id)

    async def _cancel(self, request_id: str, replica_id: str, reason: str) -> None:
        if replica_id:  # where it runs its blocks go first, whatever Redis is doing
            await self._workers.cancel_at(replica_id, request_id, 0, reason)
        met = await self._store.cancel(request_id)
        if met.replica_id and met.replica_id != replica_id:
            await self._workers.cancel_at(met.replica_id, request_id, 0, reason)


def unknown_request(request_id: str) -> SloServeError:
    """There is no such request, or it is another tenant's: nobody learns which."""
    return SloServeError(Reason.REQUEST_UNKNOWN, f"no request {request_id!r}")
