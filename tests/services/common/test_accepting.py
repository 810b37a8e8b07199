"""Many calls of one method begin at a time, and a stopped server leaves nothing behind."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest

from protos import worker_pb2, worker_pb2_grpc
from services.common import accepting
from services.common.accepting import CHECKED_RELEASE, release_is_checked
from services.common.errors import Reason, SloServeError
from services.common.rpc import RpcServer, open_channel
from tests.tasks import no_task_left

PATIENCE_S = 30.0
CALLS = 200


class Turns(worker_pb2_grpc.WorkerServicer):
    """Counts turns of the event loop, and how many calls began in each."""

    def __init__(self) -> None:
        self.turn = 0
        self.began = Counter[int]()

    async def count(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)

    async def Cancel(  # noqa: N802 - the name is the contract's
        self, request: worker_pb2.WorkerCancelRequest, context: Any
    ) -> worker_pb2.WorkerCancelResponse:
        self.began[self.turn] += 1
        if request.reason == "refuse":
            raise SloServeError(Reason.REQUEST_UNKNOWN, "no such request")
        return worker_pb2.WorkerCancelResponse(cancelled=True)


async def serve() -> tuple[Turns, RpcServer]:
    turns, server = Turns(), RpcServer("127.0.0.1:0")
    worker_pb2_grpc.add_WorkerServicer_to_server(turns, server.grpc)
    await server.start([])
    return turns, server


def test_the_pinned_grpcio_is_the_one_that_was_checked() -> None:
    assert release_is_checked(), f"compare services/common/accepting.py with grpcio {grpc.__version__}'s server"


async def test_several_calls_begin_in_one_turn_of_the_event_loop() -> None:
    turns, server = await serve()
    counting = asyncio.create_task(turns.count())
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        async with asyncio.timeout(PATIENCE_S):
            while not any(number > 1 for number in turns.began.values()):  # grpc.aio's own loop never gets there
                await asyncio.gather(*(stub.Cancel(worker_pb2.WorkerCancelRequest()) for _ in range(CALLS)))
    counting.cancel()
    await server.stop(0)


async def test_every_call_is_answered_with_its_own_status() -> None:
    turns, server = await serve()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        reasons = ["refuse" if number % 2 else "" for number in range(CALLS)]
        calls = [stub.Cancel(worker_pb2.WorkerCancelRequest(reason=reason)) for reason in reasons]
        codes = [await call.code() for call in calls]
    await server.stop(0)
    assert codes == [grpc.StatusCode.NOT_FOUND if reason else grpc.StatusCode.OK for reason in reasons]
    assert turns.began.total() == CALLS


async def test_a_stopped_server_leaves_no_task() -> None:
    async with no_task_left():
        _, server = await serve()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            await worker_pb2_grpc.WorkerStub(channel).Cancel(worker_pb2.WorkerCancelRequest())
        await server.stop(0)


async def test_another_grpcio_is_served_by_its_own_loop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accepting, "CHECKED_RELEASE", f"{CHECKED_RELEASE}0")
    _, server = await serve()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        answer = await worker_pb2_grpc.WorkerStub(channel).Cancel(worker_pb2.WorkerCancelRequest())
    await server.stop(0)
    assert answer.cancelled
    assert "one by one" in caplog.text
