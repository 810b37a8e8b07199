"""All live workers: a link to each on sight, tokens to their sessions, and word of those that are gone."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from protos import router_pb2, worker_pb2
from services.admission.background import Background
from services.admission.session import Intake, Session
from services.admission.sessions import Sessions
from services.admission.worker_link import WorkerLink
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.instruments import AdmissionInstruments
from services.common.kept import KeptTasks
from services.common.registry import FleetChange, ReplicaRegistry

__all__ = ["Workers"]

_log = logging.getLogger(__name__)

_DOUBT_S = 0.9  # what a worker whose stream broke has left to renew its lease: it does so every half second
_RETURN_S = 1.2  # a worker that is there has its lease back by then


class Workers:
    """The links of this process.

    `on_doubt` is called with a session whose worker may have lost it, and how many seconds to wait before it is
    examined: a worker without a lease that could be reached until now may only have missed a renewal. `on_declined` is
    called with one whose client takes no best effort and whose attempt cannot be promised.
    """

    def __init__(
        self,
        sessions: Sessions,
        admission_id: str,
        registry: ReplicaRegistry,
        clock: Clock,
        instruments: AdmissionInstruments,
        background: Background,
        tasks: KeptTasks,
        on_doubt: Callable[[Session, float], None],
        on_declined: Callable[[Session, int], None],
        on_promised: Callable[[], None],
    ) -> None:
        self._sessions = sessions
        self._admission_id = admission_id
        self._registry = registry
        self._clock = clock
        self._instruments = instruments
        self._background = background
        self._tasks = tasks
        self._on_doubt = on_doubt
        self._on_declined = on_declined
        self._on_promised = on_promised
        self._links: dict[str, WorkerLink] = {}
        self._attaching: set[str] = set()

    def fleet_changed(self, change: FleetChange, replicas: Mapping[str, router_pb2.Replica]) -> None:
        """Link to workers that came, let go of those that left. A restarted one does both."""
        patience_s: dict[str, float] = {}
        for replica_id in change.left:
            link = self._links.pop(replica_id, None)
            if link is not None:
                patience_s[replica_id] = _RETURN_S if link.up and replica_id not in replicas else 0.0
                _log.warning("worker %s is gone", replica_id)
                self._background.start(link.close(), f"closing the link to {replica_id}")
        for replica_id in change.joined:
            self._open(replicas.get(replica_id))
        if change.left:
            for session in self._sessions.live():
                if not session.replica_id or session.replica_id in change.left:
                    self._on_doubt(session, patience_s.get(session.replica_id, 0.0))

    def link(self, replica_id: str) -> WorkerLink | None:
        """The link to a live worker."""
        return self._links.get(replica_id)

    def attach(self, session: Session) -> None:
        """Ask a session's worker for everything after what we have."""
        if session.request_id not in self._attaching:
            self._attaching.add(session.request_id)
            self._background.start(self._attach(session), f"attach of {session.request_id}")

    def cancel(self, session: Session, reason: str) -> None:
        """Tell a session's worker to stop it."""
        work = self.cancel_at(session.replica_id, session.request_id, session.attempt, reason)
        self._background.start(work, f"cancel of {session.request_id}")

    async def cancel_at(self, replica_id: str, request_id: str, attempt: int, reason: str) -> None:
        """Tell a worker to stop a request; a worker that cannot be told is gone or finds out by itself."""
        link = self._links.get(replica_id)
        if link is None:
            return
        try:
            await link.cancel(request_id, attempt, reason)
        except SloServeError as error:
            _log.warning("cancel of %s on %s: %s", request_id, replica_id, error)

    async def close(self) -> None:
        """Close every link."""
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _open(self, replica: router_pb2.Replica | None) -> None:
        if replica is None or replica.replica_id in self._links:
            return
        replica_id = replica.replica_id
        gauge = self._instruments.clock_skew_s
        self._links[replica_id] = WorkerLink(
            replica,
            self._admission_id,
            self._clock,
            self._tasks,
            on_chunks=self._take,
            on_linked=lambda: self._linked(replica_id),
            on_broken=lambda: self._broken(replica_id, replica.started_us),
            on_skew=lambda skew_s: gauge.set(skew_s, {"slos_serve.replica": replica_id}),
        )

    def _linked(self, replica_id: str) -> None:
        for session in self._sessions.live():
            if session.replica_id == replica_id:
                self.attach(session)

    def _broken(self, replica_id: str, started_us: int) -> None:
        self._background.start(self._doubt_worker(replica_id, started_us), f"doubt about {replica_id}")

    async def _doubt_worker(self, replica_id: str, started_us: int) -> None:
        try:
            await self._registry.doubt(replica_id, started_us, _DOUBT_S)
        except SloServeError as error:  # its lease runs out by itself
            _log.info("the lease of %s is not cut short: %s", replica_id, error)

    def _take(self, replica_id: str, chunks: Sequence[worker_pb2.TokenChunk]) -> None:
        now_s = self._clock.now_s()
        link = self._links.get(replica_id)
        skew_us = round(link.skew_s * 1e6) if link is not None else 0
        for chunk in chunks:
            session = self._sessions.get(chunk.request_id)
            if session is None:
                continue  # given up here; its cancel is under way
            session.last_heard_s = now_s
            if chunk.emitted_at_us and chunk.token_ids:
                session.emitted_us = chunk.emitted_at_us - skew_us
            try:
                self._take_one(replica_id, session, chunk)
            except Exception as error:  # a bug that one request has met: the others on this stream go on
                self._background.failed(f"taking tokens of {session.request_id}", "Session.take", error)
                session.fail(SloServeError(Reason.INTERNAL, f"unexpected {type(error).__name__} in its output"))
                self.cancel(session, "internal error")

    def _take_one(self, replica_id: str, session: Session, chunk: worker_pb2.TokenChunk) -> None:
        before = session.promised
        intake = session.take(replica_id, chunk)
        if session.promised and not before:
            self._on_promised()
        if intake is Intake.GAP:
            self.attach(session)
        elif intake is Intake.CUT:
            self.cancel(session, "stop")
        elif intake is Intake.DECLINED:
            self.cancel(session, "declined")
            self._on_declined(session, chunk.attempt)

    async def _attach(self, session: Session) -> None:
        try:
            link = self._links.get(session.replica_id)
            if link is None or session.state.ended:
                return
            answer = await link.attach(session.request_id, len(session.transcript.ids))
            if not answer.found:
                self._on_doubt(session, 0.0)
        except SloServeError as error:
            _log.info("attach of %s on %s: %s", session.request_id, session.replica_id, error)
        finally:
            self._attaching.discard(session.request_id)
