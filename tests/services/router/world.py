"""A planner at the other end of the wire that says what it is told, and all that a router test touches."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
from redis.asyncio import Redis

from protos import planner_pb2, planner_pb2_grpc, router_pb2, types_pb2
from services.common import keys
from services.common.clock import Clock
from services.common.embedded_redis import EmbeddedRedis
from services.common.errors import Reason, SloServeError, from_rpc_error
from services.common.registry import ReplicaRegistry
from services.common.request_store import RequestStore
from services.common.rpc import RpcServer
from services.router.compose import RouterParts

__all__ = ["ScriptedPlanner", "World", "error_of", "verdict_in"]


async def error_of(call: Awaitable[Any]) -> SloServeError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


def verdict_in(error: SloServeError) -> types_pb2.Verdict:
    [packed] = error.details
    verdict = types_pb2.Verdict()
    assert packed.Unpack(verdict)
    return verdict


class ScriptedPlanner(planner_pb2_grpc.PlannerServicer):
    """Answers with the verdict set for each replica and remembers what it was asked."""

    def __init__(self) -> None:
        self.verdicts: dict[str, types_pb2.Verdict | SloServeError] = {}
        self.asked: list[tuple[str, planner_pb2.Candidate]] = []
        self.committed: list[tuple[str, str, int]] = []
        self.released: list[tuple[str, str, int]] = []
        self.quotes: dict[str, planner_pb2.PlanQuoteResponse | SloServeError] = {}
        self.remembered: dict[str, types_pb2.Verdict | SloServeError] = {}  # by replica, whatever request is asked for
        self.quoted: list[tuple[str, planner_pb2.Candidate]] = []
        self.together = asyncio.Barrier(1)  # quotes are answered once that many are asked
        self._arrived = asyncio.Event()

    async def asked_times(self, count: int) -> None:
        """Wait until that many questions have come."""
        async with asyncio.timeout(5):
            while len(self.asked) < count:
                self._arrived.clear()
                await self._arrived.wait()

    def admit(self, replica_id: str, **fields: Any) -> None:
        self.verdicts[replica_id] = types_pb2.Verdict(
            kind=types_pb2.VERDICT_KIND_ADMITTED,
            replica_id=replica_id,
            tier="tight",
            predicted_ttft_ms=80.0,
            predicted_tpot_ms=30.0,
            **fields,
        )

    def refuse(
        self,
        replica_id: str,
        kind: types_pb2.ConstraintKind.ValueType = types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET,
        **fields: Any,
    ) -> None:
        constraint = types_pb2.Constraint(kind=kind, needed=900, available=200, detail=f"{replica_id} is full")
        self.verdicts[replica_id] = types_pb2.Verdict(
            kind=types_pb2.VERDICT_KIND_BEST_EFFORT, tier="best-effort", constraint=constraint, **fields
        )

    async def Admit(self, request: planner_pb2.AdmitRequest, context: Any) -> planner_pb2.AdmitResponse:  # noqa: N802  (named by gRPC)
        [candidate] = request.candidates
        self.asked.append((request.replica_id, candidate))
        self._arrived.set()
        verdict = self.verdicts[request.replica_id]
        if isinstance(verdict, SloServeError):
            raise verdict
        said = planner_pb2.CandidateVerdict(request_id=candidate.request_id, attempt=candidate.attempt, verdict=verdict)
        return planner_pb2.AdmitResponse(verdicts=[said])

    async def Quote(self, request: planner_pb2.PlanQuoteRequest, context: Any) -> planner_pb2.PlanQuoteResponse:  # noqa: N802  (named by gRPC)
        self.quoted.append((request.replica_id, request.candidate))
        async with asyncio.timeout(5):
            await self.together.wait()
        quote = self.quotes[request.replica_id]
        if isinstance(quote, SloServeError):
            raise quote
        return quote

    async def Explain(self, request: planner_pb2.PlanExplainRequest, context: Any) -> planner_pb2.PlanExplainResponse:  # noqa: N802  (named by gRPC)
        unknown = SloServeError(Reason.REQUEST_UNKNOWN, "no verdict is known")
        verdict = self.remembered.get(request.replica_id, unknown)
        if isinstance(verdict, SloServeError):
            raise verdict
        return planner_pb2.PlanExplainResponse(verdict=verdict)

    async def Commit(self, request: planner_pb2.CommitRequest, context: Any) -> planner_pb2.CommitResponse:  # noqa: N802  (named by gRPC)
        self.committed.append((request.replica_id, request.request_id, request.attempt))
        return planner_pb2.CommitResponse(committed=True)

    async def Release(self, request: planner_pb2.ReleaseRequest, context: Any) -> planner_pb2.ReleaseResponse:  # noqa: N802  (named by gRPC)
        self.released.append((request.replica_id, request.request_id, request.attempt))
        return planner_pb2.ReleaseResponse()


@dataclass
class World:
    """Everything a test touches."""

    redis: Redis
    server: EmbeddedRedis
    planner: ScriptedPlanner
    planner_server: RpcServer
    parts: RouterParts
    stub: Any
    store: RequestStore
    clock: Clock = field(default_factory=Clock)

    async def replica(self, replica_id: str, **fields: Any) -> router_pb2.Replica:
        """Publish a live replica and let the router see it."""
        values: dict[str, Any] = {
            "replica_id": replica_id,
            "address": "127.0.0.1:1",
            "status": router_pb2.REPLICA_STATUS_READY,
            "perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=7e-5, b=0.02)]),
            "total_blocks": 1000,
            "free_blocks": 1000,
            "block_size": 16,
            "max_num_seqs": 64,
            "max_model_len": 2048,
            "started_us": 1,
        }
        replica = router_pb2.Replica(**{**values, **fields})
        await ReplicaRegistry(self.redis).publish(replica, 60.0)
        await self.parts.fleet.refresh()
        return replica

    async def lose(self, replica_id: str) -> None:
        """The replica's lease runs out."""
        await self.redis.delete(keys.replica_key(replica_id))

    def request(self, request_id: str, ttft_ms: float = 500.0, prompt_tokens: int = 8) -> types_pb2.QueuedRequest:
        now_us = self.clock.now_us()
        return types_pb2.QueuedRequest(
            request_id=request_id,
            attempt=1,
            tenant="default",
            application="coder",
            admission_id="adm-1",
            prompt_token_ids=range(1, prompt_tokens + 1),
            stages=[
                types_pb2.Stage(
                    kind=types_pb2.STAGE_KIND_THINK, ttft_ms=ttft_ms, tpot_ms=50, max_tokens=4, tier="tight"
                ),
                types_pb2.Stage(kind=types_pb2.STAGE_KIND_ANSWER, tpot_ms=100, max_tokens=16, tier="loose"),
            ],
            arrival_us=now_us,
            ttft_deadline_us=now_us + round(ttft_ms * 1000),
        )

    async def place(
        self,
        request: types_pb2.QueuedRequest,
        policy: types_pb2.OnInfeasible.ValueType = types_pb2.ON_INFEASIBLE_BEST_EFFORT,
        **fields: Any,
    ) -> router_pb2.PlaceResponse:
        place = router_pb2.PlaceRequest(request=request, on_infeasible=policy, **fields)
        response: router_pb2.PlaceResponse = await self.stub.Place(place, timeout=10)
        return response

    async def settled(self) -> None:
        """Wait until every confirmation under way has arrived."""
        await self.parts.planners.settled()
