"""What becomes of a request whose worker may have lost it: its record in Redis says, and it is placed again if need be.

A session is in doubt when its replica's lease ended, when the worker does not know it after a re-subscription, or when
nothing was heard of it for a while. The client sees a pause, not an error, unless no place is found in time.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from protos import router_pb2, types_pb2
from services.admission.background import Background
from services.admission.routers import Routers
from services.admission.session import Session
from services.admission.sessions import Sessions
from services.admission.workers import Workers
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.instruments import AdmissionInstruments
from services.common.keys import owner_name
from services.common.request_record import RequestRecord, RequestState
from services.common.request_store import RequestStore

__all__ = ["Rescue"]

_log = logging.getLogger(__name__)

_SILENCE_S = 3.0
_SWEEP_S = 1.0
_MAX_CHECKS_PER_SWEEP = 100
_RETRY_S = 0.25
_WORTH_RETRYING = (
    Reason.NO_REPLICA,
    Reason.ROUTER_UNAVAILABLE,
    Reason.BROKER_UNAVAILABLE,
    Reason.NO_CAPACITY,
    Reason.CLIENT_DEADLINE,  # of our own call: a router that does not answer
    Reason.REQUEST_CONFLICT,  # its worker is alive after all: the fleet as we see it will tell
)


class Rescue:
    """Examines sessions in doubt. `replicas` tells the live fleet."""

    def __init__(
        self,
        store: RequestStore,
        routers: Routers,
        workers: Workers,
        sessions: Sessions,
        replicas: Callable[[], Mapping[str, router_pb2.Replica]],
        clock: Clock,
        instruments: AdmissionInstruments,
        background: Background,
        patience_s: float,
    ) -> None:
        self._store = store
        self._background = background
        self._routers = routers
        self._workers = workers
        self._sessions = sessions
        self._clock = clock
        self._instruments = instruments
        self._patience_s = patience_s
        self._replicas = replicas
        self._examined: set[str] = set()

    async def examine(self, session: Session, after_s: float = 0.0) -> None:
        """Find out where a request stands and act on it. Concurrent calls for one session collapse into one."""
        if after_s > 0:
            await asyncio.sleep(after_s)
        if session.request_id in self._examined:
            return
        self._examined.add(session.request_id)
        try:
            await self._examine(session)
        except SloServeError as error:  # Redis is away: the next sweep asks again
            _log.warning("request %s cannot be examined: %s", session.request_id, error)
        finally:
            self._examined.discard(session.request_id)

    async def sweep_forever(self) -> None:
        """Examine requests of which nothing was heard for a while: the net under everything else."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            silent_since_s = self._clock.now_s() - _SILENCE_S
            silent = [s for s in self._sessions.live() if s.last_heard_s < silent_since_s and s.verdict is not None]
            silent.sort(key=lambda session: session.last_heard_s)
            for session in silent[:_MAX_CHECKS_PER_SWEEP]:
                session.last_heard_s = self._clock.now_s()
                self._background.start(self.examine(session), f"examination of {session.request_id}")

    async def _examine(self, session: Session) -> None:
        record = await self._store.get(session.request_id)
        if session.state.ended:
            return
        if record is None:
            session.fail(_lost(session, "nothing is known about it any more"))
        elif record.state is RequestState.CANCELLED:
            session.end(types_pb2.FINISH_REASON_CANCELLED)
        elif record.state is RequestState.FAILED:
            text = record.fields.get("error") or "its worker gave it up"
            session.fail(SloServeError(Reason.ENGINE_FAILED, f"request {session.request_id} failed: {text}"))
        elif record.state is RequestState.FINISHED:
            await self._fetch_rest(session, record)
        elif record.attempt > session.attempt:
            session.moved(record.attempt, record.replica_id)
            self._workers.attach(session)
        elif self._in_good_hands(record):
            self._stays(session, record)
        else:
            await self._place_again(session, record)

    def _stays(self, session: Session, record: RequestRecord) -> None:
        if record.state is not RequestState.QUEUED:
            session.replica_id = record.replica_id
            self._workers.attach(session)

    def _in_good_hands(self, record: RequestRecord) -> bool:
        """True where a live worker has it or will read it."""
        if record.state in (RequestState.NEW, RequestState.QUEUED):
            return not record.replica_id or record.replica_id in self._replicas()
        replica = self._replicas().get(record.replica_id)
        return replica is not None and owner_name(replica.replica_id, replica.started_us) == record.owner

    async def _fetch_rest(self, session: Session, record: RequestRecord) -> None:
        link = self._workers.link(record.replica_id)
        if link is not None:
            try:
                if (await link.attach(session.request_id, len(session.transcript.ids))).found:
                    return
            except SloServeError as error:
                _log.info("attach of %s on %s: %s", session.request_id, record.replica_id, error)
                link = None
        if link is None and self._in_good_hands(record):
            return  # the link to it is broken just now: it is attached once that stands, or asked about again
        session.fail(_lost(session, f"it finished on {record.replica_id}, but its last tokens are gone"))

    async def _place_again(self, session: Session, record: RequestRecord) -> None:
        lost_replica = record.replica_id or session.replica_id
        if not session.lost():
            return
        reason = f"replica {lost_replica} was lost after {len(session.transcript.ids)} output tokens"
        _log.warning("request %s: %s; placing it again", session.request_id, reason)
        give_up_s = self._clock.now_s() + self._patience_s
        while not session.state.ended:
            try:
                # All tokens we hold, sent to the client or not, are continued after.
                ids = session.transcript.ids
                response = await self._routers.replace(session.request_id, record.attempt, ids, reason)
            except SloServeError as error:
                if await self._superseded(session, record):
                    return
                if error.reason in _WORTH_RETRYING and self._clock.now_s() < give_up_s:
                    await asyncio.sleep(_RETRY_S)
                    continue
                self._instruments.replacements.add(1, {"slos_serve.outcome": "failed"})
                session.fail(_lost(session, f"{reason}, and it could not be placed again: {error.text}", error))
                return
            self._instruments.replacements.add(1, {"slos_serve.outcome": "placed"})
            session.last_heard_s = self._clock.now_s()
            session.replaced(response, _explain(session, reason, response))
            if session.state.ended:  # its client takes no best effort
                await self._store.cancel(session.request_id)
            return

    async def _superseded(self, session: Session, record: RequestRecord) -> bool:
        """True where it needs no new place: somebody else acted meanwhile, or its worker is back with its lease."""
        try:
            now = await self._store.get(session.request_id)
        except SloServeError:
            return False
        if now is None:
            return False
        unchanged = now.attempt == record.attempt and not now.state.ended
        if unchanged and not self._in_good_hands(now):
            return False
        session.moved(max(now.attempt, session.attempt), now.replica_id)
        if now.state.ended:
            await self._examine(session)
        else:
            self._workers.attach(session)
        return True


def _lost(session: Session, why: str, cause: SloServeError | None = None) -> SloServeError:
    delay_ms = cause.retry_after_ms if cause else None
    return SloServeError(Reason.WORKER_LOST, f"request {session.request_id}: {why}", retry_after_ms=delay_ms)


def _explain(session: Session, reason: str, response: router_pb2.PlaceResponse) -> str:
    where = response.replica_id or "the best-effort queue"
    sampling = session.facts.queued.sampling
    notes = [f"{reason}; placed again on {where}"]
    if session.transcript.ids and _has_penalties(sampling):
        notes.append("penalties count from here on")
    if session.transcript.ids and sampling.temperature != 0:
        notes.append("the continuation is another draw")
    return "; ".join(notes)


def _has_penalties(sampling: types_pb2.Sampling) -> bool:
    plain = (0.0, 0.0, 1.0)
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    return (sampling.presence_penalty, sampling.frequency_penalty, repetition) != plain
