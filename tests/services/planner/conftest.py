from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio
import pytest

from protos import planner_pb2, planner_pb2_grpc
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.rpc import RpcServer, open_channel
from services.planner.audit import Outcome
from services.planner.compose import compose
from services.planner.fleet import Fleet
from services.planner.promises import PlanRun
from services.planner.settings import PlannerSettings
from tests.tasks import no_task_left

WAIT_S = 5.0


class WorkerStream:
    """The worker's side of one Observe stream."""

    def __init__(self, stub: planner_pb2_grpc.PlannerAsyncStub) -> None:
        self.call = stub.Observe()
        self.parameters: list[planner_pb2.BatchParameters] = []
        self._call: grpc.aio.StreamStreamCall[planner_pb2.ReplicaState, planner_pb2.Directive] = self.call

    async def send(self, state: planner_pb2.ReplicaState) -> None:
        await self._call.write(state)

    async def next(self) -> planner_pb2.Directive:
        """The next directive about requests, batch parameters put aside; fails the test rather than wait for ever."""
        while True:
            directive = await self._read()
            if not directive.HasField("batch_parameters"):
                return directive
            self.parameters.append(directive.batch_parameters)

    async def next_parameters(self) -> planner_pb2.BatchParameters:
        """The next batch parameters."""
        directive = await self._read()
        assert directive.HasField("batch_parameters"), directive
        return directive.batch_parameters

    async def _read(self) -> planner_pb2.Directive:
        async with asyncio.timeout(WAIT_S):
            directive = await self._call.read()
        assert isinstance(directive, planner_pb2.Directive), "the planner ended the stream"
        return directive

    async def refused(self) -> grpc.aio.AioRpcError:
        """The error the planner ends the stream with."""
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                while await self._call.read() is not grpc.aio.EOF:
                    pass
        return refused.value


@dataclass
class RunningPlanner:
    """A planner behind a real gRPC server, with everything it told its observers."""

    clock: Clock
    stub: planner_pb2_grpc.PlannerAsyncStub
    fleet: Fleet
    runs: list[PlanRun]
    outcomes: list[Outcome]

    @asynccontextmanager
    async def worker(self, *states: planner_pb2.ReplicaState) -> AsyncIterator[WorkerStream]:
        """A worker whose stream stands and that has said `states`."""
        stream = WorkerStream(self.stub)
        for state in states:
            await stream.send(state)
        if states:
            await self.until(lambda: self.ready(states[0].replica_id))
        try:
            yield stream
        finally:
            stream.call.cancel()

    def ready(self, replica_id: str = "gpu-0") -> bool:
        """Whether the planner has taken a state of the replica and its stream stands."""
        replica = self.fleet.find(replica_id)
        return replica is not None and replica.ledger.ready

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the planner work until the condition holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110  # a ledger is plain data: there is no event to wait on
                await asyncio.sleep(0.001)

    async def admit(
        self, *candidates: planner_pb2.Candidate, replica_id: str = "gpu-0"
    ) -> list[planner_pb2.CandidateVerdict]:
        answer = await self.stub.Admit(planner_pb2.AdmitRequest(replica_id=replica_id, candidates=candidates))
        return list(answer.verdicts)


CATALOGUE = Catalogue.model_validate(
    {
        "tiers": {"tight": 50, "loose": 100},
        "applications": {
            "chatbot": {"stages": [{"ttft_slowdown": 5, "tpot_ms": 100}]},
            "coder": {"stages": [{"ttft_slowdown": 5, "tpot_ms": 50}], "weight": 2},
        },
    }
)


@pytest.fixture
async def planner() -> AsyncIterator[RunningPlanner]:
    async with no_task_left(), running_planner() as running:
        yield running


@asynccontextmanager
async def running_planner() -> AsyncIterator[RunningPlanner]:
    clock, runs, outcomes = Clock(), list[PlanRun](), list[Outcome]()
    server = RpcServer("127.0.0.1:0")
    channel = open_channel(f"127.0.0.1:{server.port}")
    parts = compose(PlannerSettings(forget_s=0.5), CATALOGUE, clock, on_run=[runs.append], on_outcome=outcomes.append)
    planner_pb2_grpc.add_PlannerServicer_to_server(parts.service, server.grpc)
    await server.start(["slosserve.v1.Planner"])
    stub: planner_pb2_grpc.PlannerAsyncStub = planner_pb2_grpc.PlannerStub(channel)
    try:
        yield RunningPlanner(clock, stub, parts.fleet, runs, outcomes)
    finally:
        await channel.close()
        await server.stop(0)
