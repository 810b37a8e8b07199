"""The parts of an admission process, put together, and the order in which they start and stop."""

import logging
from collections.abc import Mapping
from pathlib import Path

from redis.asyncio import Redis

from protos import admission_pb2_grpc, router_pb2
from services.admission.accounts import Accounts
from services.admission.background import Background
from services.admission.comebacks import Comebacks
from services.admission.delivery import DeliveryLag
from services.admission.doorkeeper import Doorkeeper
from services.admission.endings import Endings
from services.admission.explaining import Explainer
from services.admission.front import Front
from services.admission.handover import Handover
from services.admission.presence import Presence
from services.admission.quoting import Quoter
from services.admission.record_notes import RecordNotes
from services.admission.refusals import Refusals
from services.admission.rescue import Rescue
from services.admission.resolve import Resolver
from services.admission.routers import Routers
from services.admission.service import SERVICE, AdmissionService
from services.admission.session import Session
from services.admission.sessions import Sessions
from services.admission.settings import AdmissionSettings
from services.admission.tokens import ModelTokens
from services.admission.workers import Workers
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.errors import Reason, SloServeError
from services.common.instruments import AdmissionInstruments
from services.common.kept import KeptTasks
from services.common.registry import FleetChange, ReplicaRegistry, ReplicaWatcher
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer

__all__ = ["AdmissionProcess", "served_name"]

_log = logging.getLogger(__name__)

_LAST_CALLS_S = 5.0


def served_name(model: str) -> str:
    """What the model is called in metrics: a hub id as it is, a directory by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


class AdmissionProcess:
    """Everything one process runs. Usage: `await start()`, then `await drain(grace_s)` and `await stop()`."""

    def __init__(
        self,
        settings: AdmissionSettings,
        catalogue: Catalogue,
        tokens: ModelTokens,
        redis: Redis,
        clock: Clock,
        instruments: AdmissionInstruments,
    ) -> None:
        self._task_failures = instruments.task_failures
        self._background = Background(self._task_failed)
        self._tasks = KeptTasks(self._task_failed, self._show_health)
        self._watcher = ReplicaWatcher(redis, self._fleet_changed, tasks=self._tasks)
        store = RequestStore(redis, clock)
        accounts = Accounts(instruments, clock, served_name(settings.model))
        self._routers = Routers(settings.routers)
        lag = DeliveryLag(clock, instruments)
        self.sessions = Sessions(accounts, clock, lag, lambda session: self._endings.abandon(session))
        self._comebacks = Comebacks(clock)
        self._presence = Presence(redis, settings.admission_id, self._tasks)
        self._workers = Workers(
            self.sessions,
            settings.admission_id,
            ReplicaRegistry(redis),
            clock,
            instruments,
            self._background,
            self._tasks,
            self._doubt,
            self._declined,
            self._comebacks.taken,
        )
        self._rescue = Rescue(
            store,
            self._routers,
            self._workers,
            self.sessions,
            lambda: self.replicas,
            clock,
            instruments,
            self._background,
            settings.rescue_patience_s,
        )
        notes = RecordNotes(redis)
        handover = Handover(
            notes, store, self.sessions, self._workers, tokens, settings.admission_id, settings.keep_finished_s
        )
        self._endings = Endings(store, self.sessions, self._workers, handover, self._background)
        resolver = Resolver(catalogue, tokens, settings.admission_id, self._live_replicas, lag)
        refusals = self._refusals = Refusals(notes)
        front = Front(
            resolver=resolver,
            tokens=tokens,
            admission_id=settings.admission_id,
            keep_s=settings.keep_finished_s,
            clock=clock,
            store=store,
            routers=self._routers,
            sessions=self.sessions,
            handover=handover,
            endings=self._endings,
            refusals=refusals,
            accounts=accounts,
            doorkeeper=Doorkeeper(clock, settings.max_placing),
            comebacks=self._comebacks,
        )
        self._service = AdmissionService(
            resolver=resolver,
            front=front,
            quoter=Quoter(resolver, self._routers),
            explainer=Explainer(store, refusals, self.sessions, self._routers, clock),
            sessions=self.sessions,
            handover=handover,
            endings=self._endings,
            clock=clock,
        )
        self._server = RpcServer(f"{settings.host}:{settings.port}", crowded=[f"/{SERVICE}/Generate"])
        admission_pb2_grpc.add_AdmissionServicer_to_server(self._service, self._server.grpc)

    @property
    def port(self) -> int:
        """The port that is served."""
        return self._server.port

    async def _live_replicas(self) -> Mapping[str, router_pb2.Replica]:
        """The live replicas; where none is known to be ready the leases are read now, not at the next poll."""
        if not any(replica.perf_model.segments for replica in self._watcher.replicas.values()):
            await self._watcher.refresh()
        return self._watcher.replicas

    @property
    def replicas(self) -> Mapping[str, router_pb2.Replica]:
        """The live fleet as this process sees it."""
        return self._watcher.replicas

    @property
    def draining(self) -> bool:
        """True once new requests are refused."""
        return self._service.draining

    async def start(self) -> None:
        """Watch the fleet, link to its workers, serve."""
        await self._presence.start()
        await self._watcher.start()
        self._tasks.keep("rescue sweep", self._rescue.sweep_forever)
        await self._server.start([SERVICE])
        await self._set_serving()  # a task may be down already

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and let the running ones finish, for up to `grace_s`.

        What still runs then ends with ADMISSION_DRAINING; it is cancelled unless its client asked for a grace of its
        own, with which another process can resume it.
        """
        self._service.drain()
        await self._server.set_serving(False)
        if await self.sessions.wait_idle(grace_s):
            return
        left = self.sessions.read()
        _log.warning("%d requests still run after %g s of draining", len(left), grace_s)
        for session in left:
            resumable = session.facts.resume_grace_s > 0
            hint = "resume it at another one" if resumable else "it was cancelled"
            text = f"this admission process shut down before request {session.request_id} was done; {hint}"
            session.fail(SloServeError(Reason.ADMISSION_DRAINING, text, retry_after_ms=0.0))
            if not resumable:
                self._endings.give_up(session)

    async def stop(self) -> None:
        """Stop serving and let go of everything."""
        self._service.drain()
        await self._server.stop(1.0)
        await self._watcher.stop()
        await self._tasks.cancel("rescue sweep")
        self.sessions.close()
        await self._background.drain(_LAST_CALLS_S)
        await self._background.close()
        await self._presence.stop()
        await self._workers.close()
        await self._routers.close()

    def _task_failed(self, kind: str) -> None:
        self._task_failures.add(1, {"slos_serve.task": kind})

    def _show_health(self, _: bool) -> None:
        self._background.start(self._set_serving(), "health")

    async def _set_serving(self) -> None:
        """NOT_SERVING while one of this process's own tasks is down; a drain stays one."""
        await self._server.set_serving(self._tasks.whole and not self.draining)

    def _fleet_changed(self, change: FleetChange) -> None:
        self._workers.fleet_changed(change, self._watcher.replicas)

    def _doubt(self, session: Session, after_s: float) -> None:
        self._background.start(self._rescue.examine(session, after_s), f"examination of {session.request_id}")

    def _declined(self, session: Session, attempt: int) -> None:
        if session.error is not None:
            self._comebacks.pace(session.error)
            work = self._refusals.keep(session.request_id, session.error, attempt)
            self._background.start(work, f"rejection of {session.request_id}")
