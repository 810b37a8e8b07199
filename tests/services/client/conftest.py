"""A scripted front door."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from protos import admission_pb2, admission_pb2_grpc
from services.client import SlosClient
from services.common.errors import SloServeError
from services.common.rpc import RpcServer

Script = Callable[[Any, Any], AsyncIterator[admission_pb2.GenerateEvent]]


@dataclass
class ScriptedAdmission(admission_pb2_grpc.AdmissionServicer):
    """Plays one script per call, and keeps what was asked and with which metadata."""

    scripts: list[Script] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    ended: list[bool] = field(default_factory=list)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[admission_pb2.GenerateEvent]:  # noqa: N802
        async for event in self._play(request, context):
            yield event

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[admission_pb2.GenerateEvent]:  # noqa: N802
        async for event in self._play(request, context):
            yield event

    async def Cancel(self, request: Any, context: Any) -> admission_pb2.CancelResponse:  # noqa: N802
        self.asked.append(request)
        return admission_pb2.CancelResponse(cancelled=True)

    async def Quote(self, request: Any, context: Any) -> admission_pb2.QuoteResponse:  # noqa: N802
        return await self._answer(request, context)

    async def Explain(self, request: Any, context: Any) -> admission_pb2.ExplainResponse:  # noqa: N802
        return await self._answer(request, context)

    async def _answer(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        answer = self.answers.pop(0)
        if isinstance(answer, SloServeError):
            raise answer
        return answer

    async def _play(self, request: Any, context: Any) -> AsyncIterator[admission_pb2.GenerateEvent]:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        context.add_done_callback(lambda _: self.ended.append(True))
        async for event in self.scripts.pop(0)(request, context):
            yield event


@pytest.fixture
async def admission() -> AsyncIterator[ScriptedAdmission]:
    yield ScriptedAdmission()


@pytest.fixture
async def client(admission: ScriptedAdmission) -> AsyncIterator[SlosClient]:
    server = RpcServer("127.0.0.1:0")
    admission_pb2_grpc.add_AdmissionServicer_to_server(admission, server.grpc)
    await server.start([])
    async with SlosClient(f"127.0.0.1:{server.port}", key="some-key") as client:
        yield client
    await server.stop(0)


def broken(context: Any) -> Any:
    """How a lost connection looks to a client."""
    return context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
