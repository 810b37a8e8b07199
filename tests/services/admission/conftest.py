"""An admission process in this process, between a real Redis and scripted ends.

The index of the fleet is one for all: these tests have a server of their own, emptied before each.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis

from protos import admission_pb2_grpc, router_pb2_grpc
from services.admission.compose import AdmissionProcess
from services.admission.settings import AdmissionSettings
from services.admission.tokens import ModelTokens, load_model_tokens
from services.client import SlosClient
from services.common.broker import connect
from services.common.clock import Clock
from services.common.config import Catalogue, load_catalogue
from services.common.embedded_redis import EmbeddedRedis
from services.common.instruments import admission_instruments
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer, open_channel
from tests.services.admission.world import ScriptedRouter, ScriptedWorker, World
from tests.tasks import no_task_left

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "models" / "tiny"


@pytest.fixture(scope="session", autouse=True)
def spans() -> InMemorySpanExporter:
    """Finished spans of this test process; a process has one tracer provider."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    provider, exporter = trace.get_tracer_provider(), InMemorySpanExporter()
    assert isinstance(provider, TracerProvider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@pytest.fixture(scope="session")
def tokens() -> ModelTokens:
    return load_model_tokens(str(MODEL))


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    return load_catalogue(ROOT / "deploy" / "slos.yaml")


@pytest.fixture(scope="session")
def admission_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("admission-redis")) as server:
        yield server


class _Stack:
    """Starts parts and stops them in reverse."""

    def __init__(self, redis: Redis, url: str, catalogue: Catalogue, tokens: ModelTokens, cleanup: AsyncExitStack):
        self.redis, self.url, self.catalogue, self.tokens, self.cleanup = redis, url, catalogue, tokens, cleanup
        self.metrics = InMemoryMetricReader()
        self.meter = MeterProvider(metric_readers=[self.metrics]).get_meter("tests")
        self.router_address = ""

    async def router(self) -> ScriptedRouter:
        router, server = ScriptedRouter(self.redis), RpcServer("127.0.0.1:0")
        router_pb2_grpc.add_RouterServicer_to_server(router, server.grpc)
        await server.start([])
        self.cleanup.push_async_callback(server.stop, 0)
        self.router_address = router.address = f"127.0.0.1:{server.port}"
        return router

    async def worker(self, replica_id: str, **description: Any) -> ScriptedWorker:
        worker = ScriptedWorker(replica_id, self.redis)
        await worker.start(**description)
        self.cleanup.push_async_callback(worker.stop)
        return worker

    async def admission(self, catalogue: Catalogue | None = None, **changes: Any) -> AdmissionProcess:
        values = {
            "redis_url": self.url,
            "port": 0,
            "model": str(MODEL),
            "routers": self.router_address,
            "rescue_patience_s": 1.5,  # longer than a busy machine may stand still
        }
        settings = AdmissionSettings(**{**values, **changes})
        instruments = admission_instruments(self.meter)
        process = AdmissionProcess(settings, catalogue or self.catalogue, self.tokens, self.redis, Clock(), instruments)
        await process.start()
        self.cleanup.push_async_callback(process.stop)
        return process


@pytest.fixture
async def world(admission_redis: EmbeddedRedis, catalogue: Catalogue, tokens: ModelTokens) -> AsyncIterator[World]:
    async with no_task_left(), AsyncExitStack() as cleanup:
        redis = await connect(admission_redis.url)
        cleanup.push_async_callback(redis.aclose)
        await redis.flushall()
        stack = _Stack(redis, admission_redis.url, catalogue, tokens, cleanup)
        router = await stack.router()
        worker = await stack.worker("w0")
        admission = await stack.admission()
        channel = open_channel(f"127.0.0.1:{admission.port}")
        cleanup.push_async_callback(channel.close)
        client = await cleanup.enter_async_context(SlosClient(f"127.0.0.1:{admission.port}"))
        yield World(
            redis,
            RequestStore(redis),
            router,
            worker,
            admission,
            client,
            admission_pb2_grpc.AdmissionStub(channel),
            stack.metrics,
            stack.worker,
            stack.admission,
        )
