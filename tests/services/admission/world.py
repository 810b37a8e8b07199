"""The other ends of an admission process's wires: a scripted router and scripted workers over real gRPC and Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from redis.asyncio import Redis

from protos import (
    admission_pb2,
    admission_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    types_pb2,
    worker_pb2,
    worker_pb2_grpc,
)
from services.admission.compose import AdmissionProcess
from services.admission.tokens import ModelTokens
from services.client import SlosClient
from services.common import keys
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.registry import ReplicaRegistry
from services.common.request_record import RequestState
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer
from tests.services.owners import claim

LEASE_S = 30.0
PATIENCE_S = 10.0

ADMITTED = types_pb2.VERDICT_KIND_ADMITTED
BEST_EFFORT = types_pb2.VERDICT_KIND_BEST_EFFORT
PENDING = types_pb2.VERDICT_KIND_PENDING


async def soon(wanted: Callable[[], bool]) -> None:
    """Wait until something is true; a test that waits too long fails."""
    async with asyncio.timeout(PATIENCE_S):
        while not wanted():  # noqa: ASYNC110 - what is awaited is state of the other end
            await asyncio.sleep(0.005)


@dataclass
class Output:
    """What a scripted worker has generated for one request."""

    admission_id: str
    attempt: int
    ids: list[int] = field(default_factory=list)
    finish: Any = types_pb2.FINISH_REASON_UNSPECIFIED


class ScriptedWorker(worker_pb2_grpc.WorkerServicer):
    """Generates what the test says; holds a lease and remembers its output as a real worker does."""

    def __init__(self, replica_id: str, redis: Redis) -> None:
        self.replica_id = replica_id
        self.cancels: list[worker_pb2.WorkerCancelRequest] = []
        self.attaches: list[worker_pb2.AttachRequest] = []
        self.outputs: dict[str, Output] = {}
        self.started_us = Clock().now_us()
        self._registry = ReplicaRegistry(redis)
        self._store = RequestStore(redis)
        self._channels: dict[str, asyncio.Queue[worker_pb2.TokenChunk]] = {}
        self._server = RpcServer("127.0.0.1:0")
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server.grpc)

    async def start(self, *, k_tok: float = 1e-5, b: float = 0.005, max_model_len: int = 4096) -> None:
        await self._server.start([])
        self._replica = router_pb2.Replica(
            replica_id=self.replica_id,
            address=f"127.0.0.1:{self._server.port}",
            model="tiny",
            engine="emulated",
            status=router_pb2.REPLICA_STATUS_READY,
            perf_model=types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=k_tok, b=b)]),
            max_model_len=max_model_len,
            started_us=self.started_us,
        )
        await self.publish()

    async def publish(self) -> None:
        """Take the lease."""
        await self._registry.publish(self._replica, LEASE_S)

    async def lose_lease(self) -> None:
        """The lease runs out; the process is there."""
        await self._registry.remove(self.replica_id, self.started_us)

    async def stop(self) -> None:
        await self._server.stop(0)

    async def die(self) -> None:
        """The process is gone and its lease has run out."""
        await self.stop()
        await self._registry.remove(self.replica_id, self.started_us)

    def break_streams(self) -> None:
        """Every subscription ends; the worker and its memory stay."""
        for channel in self._channels.values():
            channel.put_nowait(None)  # type: ignore[arg-type]

    @property
    def owner(self) -> str:
        """Its name in Redis."""
        return keys.owner_name(self.replica_id, self.started_us)

    async def claim(self, queued: types_pb2.QueuedRequest) -> None:
        """Take a placed request: it is ours in Redis, and its output begins."""
        attempt = await claim(self._store, queued.request_id, queued.attempt, self.owner)
        assert attempt, "the request was not there to be claimed"
        self.outputs[queued.request_id] = Output(queued.admission_id, attempt, list(queued.delivered_token_ids))

    async def finish_in_redis(self, request_id: str, state: RequestState) -> None:
        record = await self._store.get(request_id)
        assert record is not None
        assert await self._store.finish(
            request_id, record.attempt, self.owner, state, stream=record.stream, entry_id=record.entry_id
        )

    def emit(
        self,
        request_id: str,
        ids: Sequence[int] = (),
        *,
        finish: Any = types_pb2.FINISH_REASON_UNSPECIFIED,
        verdict: types_pb2.Verdict | None = None,
        error: str = "",
        lose: bool = False,
        emitted_us: int = 0,
    ) -> None:
        """Generate `ids`; with `lose` they never reach the wire."""
        output = self.outputs[request_id]
        chunk = worker_pb2.TokenChunk(
            request_id=request_id,
            attempt=output.attempt,
            offset=len(output.ids),
            token_ids=ids,
            finish_reason=finish,
            error=error,
            verdict=verdict,
            emitted_at_us=emitted_us,
        )
        output.ids += ids
        output.finish = finish
        if not lose:
            self.channel(output.admission_id).put_nowait(chunk)

    def channel(self, admission_id: str) -> "asyncio.Queue[worker_pb2.TokenChunk]":
        return self._channels.setdefault(admission_id, asyncio.Queue())

    async def Subscribe(  # noqa: N802
        self, request: worker_pb2.SubscribeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.TokenBatch]:
        yield worker_pb2.TokenBatch(replica_id=self.replica_id, seq=1, sent_at_us=Clock().now_us())
        channel, seq = self.channel(request.admission_id), 1
        while True:
            chunks = [await channel.get()]
            while not channel.empty():
                chunks.append(channel.get_nowait())
            if None in chunks:
                return
            seq += 1
            yield worker_pb2.TokenBatch(replica_id=self.replica_id, seq=seq, sent_at_us=Clock().now_us(), chunks=chunks)

    async def Attach(self, request: worker_pb2.AttachRequest, context: Any) -> worker_pb2.AttachResponse:  # noqa: N802
        self.attaches.append(request)
        output = self.outputs.get(request.request_id)
        if output is None:
            return worker_pb2.AttachResponse(found=False)
        if request.from_token > len(output.ids):
            raise SloServeError(Reason.RESUME_OUT_OF_RANGE, f"there are {len(output.ids)} tokens")
        output.admission_id = request.admission_id
        self.channel(request.admission_id).put_nowait(
            worker_pb2.TokenChunk(
                request_id=request.request_id,
                attempt=output.attempt,
                offset=request.from_token,
                token_ids=output.ids[request.from_token :],
                finish_reason=output.finish,
            )
        )
        return worker_pb2.AttachResponse(
            found=True, attempt=output.attempt, output_tokens=len(output.ids), finished=bool(output.finish)
        )

    async def Cancel(self, request: worker_pb2.WorkerCancelRequest, context: Any) -> worker_pb2.WorkerCancelResponse:  # noqa: N802
        self.cancels.append(request)
        return worker_pb2.WorkerCancelResponse(cancelled=request.request_id in self.outputs)


class ScriptedRouter(router_pb2_grpc.RouterServicer):
    """Places on `replica_id` with `verdict`, through the real store. `error` refuses; `hold` keeps callers waiting."""

    def __init__(self, redis: Redis) -> None:
        self.address = ""
        self.replica_id = "w0"
        self.verdict: Any = ADMITTED
        self.error: SloServeError | None = None
        self.hold: asyncio.Event | None = None
        self.hold_answer: asyncio.Event | None = None  # placed, but its caller does not know
        self.placed: list[types_pb2.QueuedRequest] = []
        self.place_requests: list[router_pb2.PlaceRequest] = []
        self.replaces: list[router_pb2.ReplaceRequest] = []
        self.hops: list[router_pb2.Hop] = []
        self.quote = router_pb2.RouterQuoteResponse()
        self.quoted: list[types_pb2.QueuedRequest] = []
        self.remembered: list[router_pb2.Hop] | SloServeError = []
        self._store = RequestStore(redis)

    async def Place(self, request: router_pb2.PlaceRequest, context: Any) -> router_pb2.PlaceResponse:  # noqa: N802
        self.place_requests.append(request)
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        answer = await self._enqueue(request.request)
        if self.hold_answer is not None:
            await self.hold_answer.wait()
        return answer

    async def Replace(self, request: router_pb2.ReplaceRequest, context: Any) -> router_pb2.PlaceResponse:  # noqa: N802
        self.replaces.append(request)
        if self.error is not None:
            raise self.error
        record = await self._store.get(request.request_id)
        assert record is not None
        queued = await self._store.queued_request(record)
        assert queued is not None
        queued.attempt = request.attempt + 1
        queued.delivered_token_ids[:] = request.delivered_token_ids
        return await self._enqueue(queued)

    async def Quote(  # noqa: N802
        self, request: router_pb2.RouterQuoteRequest, context: Any
    ) -> router_pb2.RouterQuoteResponse:
        self.quoted.append(request.request)
        if self.error is not None:
            raise self.error
        return self.quote

    async def Explain(  # noqa: N802
        self, request: router_pb2.RouterExplainRequest, context: Any
    ) -> router_pb2.RouterExplainResponse:
        if isinstance(self.remembered, SloServeError):
            raise self.remembered
        return router_pb2.RouterExplainResponse(hops=self.remembered)

    @property
    def word(self) -> str:
        """The verdict as routers store it."""
        return types_pb2.VerdictKind.Name(self.verdict).removeprefix("VERDICT_KIND_").lower()

    async def _enqueue(self, queued: types_pb2.QueuedRequest) -> router_pb2.PlaceResponse:
        best_effort = self.verdict == BEST_EFFORT
        replica_id = "" if best_effort else self.replica_id
        queued.tier = "best-effort" if best_effort else queued.stages[0].tier
        queued.promised = self.verdict == ADMITTED
        stream = keys.BEST_EFFORT_QUEUE if best_effort else keys.queue_key(replica_id, queued.tier)
        where = await self._store.enqueue(queued, stream, verdict=self.word, replica_id=replica_id)
        self.placed.append(queued)
        verdict = types_pb2.Verdict(kind=self.verdict, replica_id=replica_id, tier=queued.tier, predicted_ttft_ms=12)
        if self.hops:
            verdict.constraint.CopyFrom(self.hops[-1].verdict.constraint)
        return router_pb2.PlaceResponse(
            verdict=verdict,
            replica_id=replica_id,
            stream=where.stream,
            entry_id=where.entry_id,
            attempt=queued.attempt,
            hops=self.hops,
        )


@dataclass
class World:
    """One admission process and everything around it."""

    redis: Redis
    store: RequestStore
    router: ScriptedRouter
    worker: ScriptedWorker
    admission: AdmissionProcess
    client: SlosClient
    stub: admission_pb2_grpc.AdmissionStub
    metrics: InMemoryMetricReader
    start_worker: Callable[..., Any]
    start_admission: Callable[..., Any]

    async def placed(self, count: int = 1) -> types_pb2.QueuedRequest:
        """The newest placed request, claimed by the worker, once there are `count`."""
        await soon(lambda: len(self.router.placed) >= count)
        queued = self.router.placed[-1]
        await self.worker.claim(queued)
        return queued

    def client_of(self, request: admission_pb2.GenerateRequest) -> Any:
        """A raw stream of `request`."""
        return self.stub.Generate(request)

    def metric(self, name: str) -> list[Any]:
        """Data points of an instrument."""
        data = self.metrics.get_metrics_data()
        return [
            point
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


def ids_of(tokens: ModelTokens, text: str) -> list[int]:
    """Ids of output text: no prefix."""
    return tokens.encode(text)[len(tokens.prefix_ids) :]


def generate(**fields: Any) -> admission_pb2.GenerateRequest:
    """A small valid request, changed by `fields`."""
    request = admission_pb2.GenerateRequest(
        application="chatbot", text="Return the number of items.", sampling=types_pb2.Sampling(max_tokens=32)
    )
    for name, value in fields.items():
        if isinstance(value, str | int | float):
            setattr(request, name, value)
        elif isinstance(value, list):
            del getattr(request, name)[:]
            getattr(request, name).extend(value)
        else:
            getattr(request, name).CopyFrom(value)
    return request
