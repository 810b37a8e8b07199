"""A worker from its first sign of life to its last: start, serve, drain, stop."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from redis.asyncio import Redis

from protos import planner_pb2, router_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.errors import Reason, SloServeError
from services.common.instruments import worker_instruments
from services.common.keys import owner_name
from services.common.rendezvous import planner_for
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer
from services.common.stream_reader import StreamReader
from services.common.watched import WatchedTasks
from services.common.wire import perf_model_to_wire
from services.core.fit import Sample
from services.core.lengths import LengthForecaster
from services.worker.activity import Activity
from services.worker.best_effort_room import BestEffortRoom
from services.worker.claims import Claims
from services.worker.directives import Directives
from services.worker.engine_api import Engine, EngineEnd
from services.worker.generation import GenerationParts
from services.worker.generations import Generations
from services.worker.housekeeping import Housekeeping
from services.worker.intake import Intake
from services.worker.lease import Lease
from services.worker.measure import Measure
from services.worker.outbox import Outbox
from services.worker.output import OutputEnd
from services.worker.replica_card import capacity_of, identity_of
from services.worker.reporter import Reporter
from services.worker.service import WorkerService
from services.worker.settings import WorkerSettings
from services.worker.state_mirror import StateMirror

__all__ = ["Worker"]

_log = logging.getLogger(__name__)

_PLANNER_S = 5.0
_RECENT_BATCHES = 500
_QUEUE_END_S = 5.0
_ABORT_S = 5.0
_FLUSH_S = 2.0


class Worker:
    """One replica: its engine, its queues, its lease and its gRPC service."""

    def __init__(
        self, settings: WorkerSettings, catalogue: Catalogue, redis: Redis, engine: Engine, clock: Clock
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._redis = redis
        self._engine = engine
        self._clock = clock
        self._started_us = clock.now_us()
        self._planner = planner_for(settings.replica_id, settings.planners)
        self._server = RpcServer(f"{settings.host}:{settings.port}")
        self._outbox = Outbox(settings.replica_id, clock, retention_s=settings.retention_s)
        self._forecaster = LengthForecaster()
        self._claims = Claims(RequestStore(redis, clock), owner_name(settings.replica_id, self._started_us))
        self._lease = Lease(
            redis,
            identity_of(settings, port=self._server.port, planner=self._planner, started_us=self._started_us),
            clock,
            lease_s=settings.lease_s,
            load=self._load,
            on_lost=self._verify,
        )
        self._activity = Activity(clock)
        self._engine_lost = asyncio.Event()
        self._background = WatchedTasks()
        self._measure = Measure(worker_instruments(), settings.replica_id)
        self._draining: asyncio.Task[int] | None = None
        self._drain_begun = asyncio.Event()
        self._recent: deque[Sample] = deque(maxlen=_RECENT_BATCHES)
        self._mirror: StateMirror | None = None
        self._generations: Generations | None = None
        self._intake: Intake | None = None
        self._reader = StreamReader(redis, self._claims.owner, on_dead=self._on_dead, held=self._held)

    @property
    def port(self) -> int:
        """Where its gRPC service listens."""
        return self._server.port

    @property
    def lease_held(self) -> bool:
        """Whether this replica is certainly still known to the fleet."""
        return self._lease.held

    async def start(self) -> None:
        """Take the lease as STARTING, start the engine, then serve as READY."""
        await self._lease.publish(router_pb2.REPLICA_STATUS_STARTING)
        self._background.spawn("lease", self._lease.run())
        await self._start_engine()
        info, model = self._engine.info, self._engine.perf_model
        self._mirror = StateMirror(self._settings.replica_id, info, model, self._clock)
        room = BestEffortRoom(info, model, self._settings.best_effort_patience_s, self._clock.now_s)
        generations = self._generations = Generations(self._parts(self._mirror), room.ended)
        self._intake = Intake(
            reader=self._reader,
            claims=self._claims,
            generations=generations,
            outbox=self._outbox,
            room=room,
            forecaster=self._forecaster,
            info=info,
            clock=self._clock,
            replica_id=self._settings.replica_id,
            tiers=[tier.name for tier in self._catalogue.tier_list()],
            may_claim=lambda: self._lease.held,
            weight_of=self._weight_of,
        )
        reporter = Reporter(self._planner, self._mirror, Directives(self._engine, generations).apply)
        self._background.spawn("engine", self._watch_engine())
        self._background.spawn("reports", self._follow(self._mirror, generations, self._intake))
        self._background.spawn("reporter", reporter.run())
        self._background.spawn(
            "housekeeping", Housekeeping(self._outbox, generations, self._intake, self._reader).run()
        )
        await self._serve(generations, self._mirror)
        self._lease.describe(capacity_of(self._engine))
        if not await reporter.wait_linked(_PLANNER_S):  # a fleet without its planner serves best effort
            _log.warning("ready without the planner at %s", self._planner)
        await self._lease.publish(router_pb2.REPLICA_STATUS_READY)
        self._background.spawn("intake", self._intake.run())

    async def run(self, stop: asyncio.Event, on_ready: Callable[[int], None]) -> None:
        """Start, tell `on_ready` the port, and serve until `stop` or a drain from outside; then drain.

        Raises what went wrong: a lost engine, another worker with this name.
        """
        if not await self._background.until(asyncio.create_task(self.start(), name="start"), stop):
            return
        on_ready(self.port)
        await self._background.until(asyncio.create_task(self._drain_begun.wait(), name="drain begun"), stop)
        await self.drain(None)

    async def drain(self, grace_s: float | None) -> int:
        """Finish what runs within `grace_s` (None: as configured); how many requests had to be left to others."""
        if self._draining is None:
            grace_s = self._settings.drain_grace_s if grace_s is None else grace_s
            self._draining = asyncio.create_task(self._drain(grace_s), name="drain")
            self._drain_begun.set()
        return await asyncio.shield(self._draining)

    async def stop(self) -> None:
        """Leave the fleet and stop everything. What still runs is left to other replicas.

        The engine is stopped even where this is cancelled: the process could not end while its engine lives.
        """
        try:
            await self._leave()
        finally:
            await self._engine.stop()

    async def _leave(self) -> None:
        if self._generations is not None:
            await self._generations.abandon_all()
            await self._outbox.flush(_FLUSH_S)
        await self._background.cancel()
        with contextlib.suppress(SloServeError):  # without Redis the lease runs out by itself
            await self._lease.remove()
        self._outbox.close()
        await self._server.stop(_FLUSH_S)
        if self._generations is not None:
            await self._generations.close()

    # Parts

    def _parts(self, mirror: StateMirror) -> GenerationParts:
        def on_finished(length: planner_pb2.FinishedLength, end: EngineEnd) -> None:
            mirror.finished(length)
            self._measure.finished(length, end)
            if end in (EngineEnd.STOP, EngineEnd.LENGTH):
                self._forecaster.observe(length.application, length.prompt_tokens, length.output_tokens)

        return GenerationParts(
            engine=self._engine,
            claims=self._claims,
            outbox=self._outbox,
            clock=self._clock,
            replica_id=self._settings.replica_id,
            tiers=self._catalogue.tier_list(),
            engine_lost=self._engine_lost,
            on_finished=on_finished,
            on_scheduled=self._measure.scheduled,
            reforecast=lambda *known: self._forecaster.forecast(*known).mean_tokens,
            hold_first_token=self._settings.hold_first_token,
        )

    async def _serve(self, generations: Generations, mirror: StateMirror) -> None:
        service = WorkerService(
            replica_id=self._settings.replica_id,
            engine_name=self._settings.engine,
            engine=self._engine,
            outbox=self._outbox,
            generations=generations,
            mirror=mirror,
            recent=self._recent,
            drain=self.drain,
            is_draining=lambda: self._draining is not None,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(service, self._server.grpc)
        await self._server.start([worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name])

    def _weight_of(self, name: str) -> int:
        application = self._catalogue.applications.get(name)
        return 1 if application is None else application.weight

    def _load(self) -> Mapping[str, int]:
        totals = {"idle_ms": self._activity.idle_ms, "declined": self._activity.declined}
        if self._mirror is None:
            return {"running": 0, "waiting": 0, "free_blocks": 0, **totals}
        latest = self._mirror.latest
        if latest is None:
            return {"running": 0, "waiting": 0, "free_blocks": self._engine.info.total_blocks, **totals}
        return {"running": latest.running, "waiting": latest.waiting, "free_blocks": latest.free_blocks, **totals}

    # Tasks

    async def _follow(self, mirror: StateMirror, generations: Generations, intake: Intake) -> None:
        self._engine.request_snapshot()
        async for report in self._engine.reports():
            mirror.apply(report)
            generations.apply(report)
            intake.apply(report)
            self._measure.report(report)
            self._recent.extend(Sample(shape, took_s) for shape, took_s in report.batches)
            self._activity.apply(report)
            if report.perf_model is not None:
                self._lease.describe(router_pb2.Replica(perf_model=perf_model_to_wire(report.perf_model)))

    async def _start_engine(self) -> None:
        chosen = f"SLOS_ENGINE={self._settings.engine} and SLOS_MODEL={self._settings.model}"
        try:
            await self._engine.start()
        except Exception as error:  # engines fail in many ways; the operator needs one line and the log
            _log.exception("the engine did not start")
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise SloServeError(Reason.ENGINE_FAILED, f"no engine with {chosen}: {first_line}") from error

    async def _watch_engine(self) -> None:
        await self._engine.wait_dead()
        self._engine_lost.set()
        raise SloServeError(Reason.ENGINE_FAILED, f"the engine of {self._settings.replica_id} is gone")

    async def _verify(self) -> None:
        if self._generations is not None:
            await self._generations.verify()

    def _held(self) -> Mapping[str, Sequence[str]]:
        return {} if self._intake is None else self._intake.entries

    async def _on_dead(self, request: types_pb2.QueuedRequest, reason: str) -> None:
        self._outbox.open_for(request)
        end = OutputEnd(types_pb2.FINISH_REASON_ERROR, f"given up: {reason}")
        self._outbox.finish(request.request_id, request.attempt, end)

    async def _drain(self, grace_s: float) -> int:
        until_s = self._clock.now_s() + grace_s
        generations, intake = self._generations, self._intake
        if generations is None or intake is None:
            return 0
        await self._server.set_serving(False)
        try:
            await self._lease.publish(router_pb2.REPLICA_STATUS_DRAINING)
            await intake.drain(min(grace_s, _QUEUE_END_S))
        except SloServeError as error:
            _log.warning("draining without Redis: %s", error)
        await self._background.cancel("intake")
        await generations.hand_back_unstarted()
        await generations.wait_until_idle(max(0.0, until_s - self._clock.now_s()))
        unfinished = len(generations)
        await generations.abandon_all()
        await generations.wait_until_idle(_ABORT_S)
        return unfinished
