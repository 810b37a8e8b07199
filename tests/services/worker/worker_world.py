"""A worker over real Redis and real gRPC whose engine is scripted, a listening admission process, and a planner."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from redis.asyncio import Redis

from protos import planner_pb2, planner_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.keys import BEST_EFFORT_QUEUE, GROUP, owner_name, queue_key
from services.common.request_record import RequestRecord
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer, open_channel
from services.worker.engine_api import Engine
from services.worker.settings import WorkerSettings
from services.worker.worker import Worker
from tests.services.worker.scripted_engine import ScriptedEngine
from tests.tasks import no_task_left

CATALOGUE = Catalogue.model_validate({"tiers": {"tight": 50, "loose": 100}, "applications": {}})


async def eventually(true: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait for a state that nothing announces; looks every turn of the event loop."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - what is waited for lies behind gRPC, Redis or another task
            await asyncio.sleep(0.002)


@dataclass(eq=False)
class Listener:
    """An admission process that only collects."""

    stub: worker_pb2_grpc.WorkerStub
    admission_id: str
    ids: dict[str, list[int]] = field(default_factory=dict)
    chunks: dict[str, list[worker_pb2.TokenChunk]] = field(default_factory=dict)
    ended: dict[str, worker_pb2.TokenChunk] = field(default_factory=dict)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        async for batch in self.stub.Subscribe(worker_pb2.SubscribeRequest(admission_id=self.admission_id)):
            self.ready.set()
            for chunk in batch.chunks:
                ids = self.ids.setdefault(chunk.request_id, [])
                del ids[chunk.offset :]
                assert chunk.offset == len(ids), "a gap"
                ids.extend(chunk.token_ids)
                self.chunks.setdefault(chunk.request_id, []).append(chunk)
                if chunk.finish_reason:
                    self.ended[chunk.request_id] = chunk

    async def tokens(self, request_id: str, count: int) -> list[int]:
        await eventually(lambda: len(self.ids.get(request_id, [])) >= count)
        return self.ids[request_id]

    async def end(self, request_id: str) -> worker_pb2.TokenChunk:
        await eventually(lambda: request_id in self.ended)
        return self.ended[request_id]


class ListeningPlanner(planner_pb2_grpc.PlannerServicer):
    """Collects states and sends what it is told to."""

    def __init__(self) -> None:
        self.states: list[planner_pb2.ReplicaState] = []
        self.connections = 0
        self._directives: asyncio.Queue[planner_pb2.Directive | None] = asyncio.Queue()

    def tell(self, directive: planner_pb2.Directive | None) -> None:
        """Send a directive; None ends the stream."""
        self._directives.put_nowait(directive)

    async def Observe(  # noqa: N802 - the name is the contract's
        self, request_iterator: AsyncIterator[planner_pb2.ReplicaState], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[planner_pb2.Directive]:
        self.connections += 1

        async def collect() -> None:
            async for state in request_iterator:
                self.states.append(state)

        task = asyncio.create_task(collect())
        try:
            while (directive := await self._directives.get()) is not None:
                yield directive
        finally:
            task.cancel()


@dataclass(eq=False)
class World:
    redis: Redis
    settings: WorkerSettings
    engine: Any  # ScriptedEngine, unless a test brings another
    worker: Worker
    planner: ListeningPlanner
    clock: Clock
    store: RequestStore
    stop: asyncio.Event
    serving: "asyncio.Task[None]"
    stub: worker_pb2_grpc.WorkerStub
    listener: Listener

    def request(self, request_id: str, **changes: Any) -> types_pb2.QueuedRequest:
        """A request of four prompt tokens that wants three more."""
        now_us = self.clock.now_us()
        request = types_pb2.QueuedRequest(
            request_id=request_id,
            attempt=1,
            tenant="default",
            application="chatbot",
            admission_id=self.listener.admission_id,
            prompt_token_ids=[11, 12, 13, 14],
            sampling=types_pb2.Sampling(max_tokens=3),
            stages=[
                types_pb2.Stage(
                    kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=5000, tpot_ms=100, max_tokens=200, tier="loose"
                )
            ],
            arrival_us=now_us,
            ttft_deadline_us=now_us + 5_000_000,
            tier="loose",
            promised=True,
        )
        for name, value in changes.items():
            if name == "max_tokens":
                request.sampling.max_tokens = value
            elif isinstance(value, list):
                getattr(request, name)[:] = value
            else:
                setattr(request, name, value)
        return request

    async def submit(self, request: types_pb2.QueuedRequest, stream: str = "") -> str:
        """Into `stream`, or the queue it belongs to; the entry id."""
        await self.store.begin(
            request.request_id,
            digest="d",
            admission_id=request.admission_id,
            tenant=request.tenant,
            application=request.application,
            arrival_us=request.arrival_us,
        )
        return await self.requeue(request, stream)

    async def requeue(self, request: types_pb2.QueuedRequest, stream: str = "") -> str:
        stream = stream or (self.queue(request.tier) if request.promised else BEST_EFFORT_QUEUE)
        giver = "" if request.attempt == 1 else (await self.record(request.request_id)).owner
        done = await self.store.enqueue(
            request, stream, verdict="admitted", replica_id=self.settings.replica_id, giver=giver
        )
        return done.entry_id

    async def steal(self, request: types_pb2.QueuedRequest, stream: str) -> None:
        """Place a request that this worker holds again, as it may be while the lease is gone."""
        owner = (await self.record(request.request_id)).owner
        await self.store.enqueue(request, stream, verdict="admitted", giver=owner)

    def queue(self, tier: str) -> str:
        return queue_key(self.settings.replica_id, tier)

    async def record(self, request_id: str) -> RequestRecord:
        found = await self.store.get(request_id)
        assert found is not None
        return found

    async def until_recorded(self, request_id: str, **fields: str) -> RequestRecord:
        async with asyncio.timeout(10):
            while True:
                found = await self.record(request_id)
                if all(found.fields.get(name) == value for name, value in fields.items()):
                    return found
                await asyncio.sleep(0.005)

    async def pending(self, stream: str) -> list[dict[str, Any]]:
        return list(await self.redis.xpending_range(stream, GROUP, "-", "+", 100))

    async def lease(self) -> dict[str, str]:
        raw = await self.redis.hgetall(f"slos:replica:{self.settings.replica_id}")
        return {name.decode(): value.decode() for name, value in raw.items()}

    async def until_lease(self, **fields: str) -> dict[str, str]:
        async with asyncio.timeout(10):
            while True:
                lease = await self.lease()
                if all(lease.get(name) == value for name, value in fields.items()):
                    return lease
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running_world(
    redis: Redis,
    redis_url: str,
    unique: str,
    tmp_path: Path,
    engine_of: Callable[[WorkerSettings], Engine] = lambda _: ScriptedEngine(),
    clock: Clock | None = None,
    **changes: Any,
) -> AsyncIterator[World]:
    async with no_task_left(), _running_world(redis, redis_url, unique, tmp_path, engine_of, clock, changes) as world:
        yield world


@asynccontextmanager
async def _running_world(
    redis: Redis,
    redis_url: str,
    unique: str,
    tmp_path: Path,
    engine_of: Callable[[WorkerSettings], Engine],
    clock: Clock | None,
    changes: Mapping[str, Any],
) -> AsyncIterator[World]:
    planner, planner_server = ListeningPlanner(), RpcServer("127.0.0.1:0")
    planner_pb2_grpc.add_PlannerServicer_to_server(planner, planner_server.grpc)
    await planner_server.start([])
    settings = WorkerSettings(
        **{
            "redis_url": redis_url,
            "port": 0,
            "replica_id": f"w-{unique}",
            "planners": (f"127.0.0.1:{planner_server.port}",),
            "data_dir": tmp_path,
            "drain_grace_s": 5.0,
            **changes,
        }
    )
    clock, engine, stop = clock or Clock(), engine_of(settings), asyncio.Event()
    worker = Worker(settings, CATALOGUE, redis, engine, clock)
    ready = asyncio.Event()
    serving = asyncio.create_task(worker.run(stop, lambda _: ready.set()))
    async with asyncio.timeout(120):
        await ready.wait()
    async with open_channel(f"127.0.0.1:{worker.port}", traced=False) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        listener = Listener(stub, f"a-{unique}")
        listening = asyncio.create_task(listener.listen())
        store = RequestStore(redis, clock)
        try:
            await asyncio.wait_for(listener.ready.wait(), 10)
            yield World(redis, settings, engine, worker, planner, clock, store, stop, serving, stub, listener)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await worker.stop()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await planner_server.stop(0)


def another_owner(world: World) -> str:
    """A later process of the same replica."""
    return owner_name(world.settings.replica_id, world.clock.now_us() + 1)
