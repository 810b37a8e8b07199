"""Two planners split the replicas: each plans its own, and the loss of one costs the promises of its replicas only."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from protos import planner_pb2, planner_pb2_grpc, router_pb2, router_pb2_grpc, types_pb2
from services.cli.ports import PortInUseError
from services.cli.stack import LocalStack
from services.cli.stack_layout import lay_out, redis_port
from services.cli.stack_spec import StackSpec
from services.common.clock import Clock
from services.common.rendezvous import planner_for
from services.common.rpc import open_channel
from tests.e2e.calls import Reply, generate, request
from tests.e2e.conftest import PRESET

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPLICAS = ("w0", "w1")


def splitting_port(data_dir: Path) -> int:
    """A base port whose planner addresses get one replica each: who plans what follows from the addresses."""
    for port in range(20_000, 31_900, 20):  # below those that outgoing connections take
        spec = StackSpec(data_dir=data_dir, num_workers=2, num_planners=2, base_port=port)
        try:
            redis_port(spec)
            addresses = lay_out(spec)
        except PortInUseError:
            continue
        if len({planner_for(replica, addresses.planner) for replica in REPLICAS}) == 2:
            return port
    raise AssertionError("no free ports")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    data_dir = tmp_path_factory.mktemp("planners")
    spec = StackSpec(
        data_dir=data_dir,
        engine="emulated",
        preset=PRESET,
        num_workers=2,
        num_planners=2,
        base_port=splitting_port(data_dir),
    )
    async with LocalStack(spec) as running:
        yield running


def planner_of(stack: LocalStack, replica_id: str) -> tuple[str, str]:
    """Process name and address of the planner that keeps a replica's ledger."""
    address = planner_for(replica_id, stack.addresses.planner)
    return f"planner-{stack.addresses.planner.index(address)}", address


async def quote_at(planner: str, replica_id: str) -> planner_pb2.PlanQuoteResponse:
    stage = types_pb2.Stage(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=10_000, tpot_ms=100, max_tokens=8, tier="loose")
    async with open_channel(planner, traced=False) as channel:
        stub = planner_pb2_grpc.PlannerStub(channel)
        return await stub.Quote(ask(replica_id, stage, Clock().now_us()), timeout=10)


def ask(replica_id: str, stage: types_pb2.Stage, now_us: int) -> planner_pb2.PlanQuoteRequest:
    candidate = planner_pb2.Candidate(
        request_id="asked",
        attempt=1,
        application="chatbot",
        prompt_tokens=50,
        max_tokens=8,
        arrival_us=now_us,
        ttft_deadline_us=now_us + 10_000_000,
        stages=[stage],
    )
    return planner_pb2.PlanQuoteRequest(replica_id=replica_id, candidate=candidate)


async def promised_on(stack: LocalStack, salt: int, count: int = 4) -> set[str]:
    """Replicas that promise and serve a few requests, one after the other."""
    patient = [types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=10_000, tpot_ms=100)]
    asked = [request("", 60, 5, salt=salt + n, stages=patient) for n in range(count)]
    replies = [await generate(stack.admission_address, message) for message in asked]
    assert [len(reply.ids) for reply in replies] == [5] * count
    return {place(reply) for reply in replies}


def place(reply: Reply) -> str:
    assert reply.finished is not None
    assert reply.verdicts[0].kind == types_pb2.VERDICT_KIND_ADMITTED, reply.verdicts[0]
    assert reply.finished.replica_id == reply.verdicts[0].replica_id
    return reply.finished.replica_id


async def test_each_replica_reports_to_the_planner_that_rendezvous_hashing_names(stack: LocalStack) -> None:
    async with open_channel(stack.router_address, traced=False) as channel:
        answer = await router_pb2_grpc.RouterStub(channel).ListReplicas(router_pb2.ListReplicasRequest())
    assert {replica.replica_id: replica.planner for replica in answer.replicas} == {
        replica: planner_of(stack, replica)[1] for replica in REPLICAS
    }
    for mine, other in (REPLICAS, REPLICAS[::-1]):
        planner = planner_of(stack, mine)[1]
        assert (await quote_at(planner, mine)).fits
        with pytest.raises(grpc.aio.AioRpcError, match=f"'{other}' does not report to this planner"):
            await quote_at(planner, other)


@pytest.mark.parametrize(("lost", "left"), [REPLICAS, REPLICAS[::-1]])
async def test_without_one_planner_promises_are_made_on_the_others_replicas(
    stack: LocalStack, lost: str, left: str
) -> None:
    process, address = planner_of(stack, lost)
    await stack.kill(process)
    assert await promised_on(stack, salt=300 + 10 * REPLICAS.index(lost)) == {left}
    await stack.restart(process)
    await reported_again(address, lost)
    assert await promised_on(stack, salt=340 + 10 * REPLICAS.index(lost)) <= set(REPLICAS)


async def reported_again(planner: str, replica_id: str) -> None:
    """Return once the restarted planner has the replica's ledger: the worker reconnects by itself."""
    async with asyncio.timeout(30):
        while True:
            try:
                if (await quote_at(planner, replica_id)).fits:
                    return
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.NOT_FOUND, error
            await asyncio.sleep(0.05)
