"""Drains and outages: SIGTERM finishes what runs; a killed worker, planner or Redis loses nothing that was promised."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec
from tests.e2e.calls import Reply, admission, generate, request
from tests.e2e.conftest import PRESET

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    spec = StackSpec(
        data_dir=tmp_path_factory.mktemp("drain"), engine="emulated", preset=PRESET, num_workers=2, drain_grace_s=30
    )
    async with LocalStack(spec) as running:
        yield running


async def collect(call, started: asyncio.Event) -> Reply:
    reply = Reply()
    async for event in call:
        reply.take(event)
        if reply.ids:
            started.set()
    return reply


async def test_draining_worker_finishes_what_it_runs(stack: LocalStack) -> None:
    async with admission(stack.admission_address) as stub:
        started = asyncio.Event()
        running = asyncio.create_task(
            collect(stub.Generate(request("chatbot", 100, 80, salt=100), timeout=60), started)
        )
        await asyncio.wait_for(started.wait(), 30)
        busy, idle = await which_runs(stack)
        status = await stack.terminate(busy)
        reply = await running
    assert status == 0
    assert len(reply.ids) == 80
    assert reply.finished is not None
    assert reply.finished.attempts == 1
    after = await generate(stack.admission_address, request("chatbot", 100, 5, salt=101))
    assert after.finished is not None
    assert after.finished.replica_id == idle.replace("worker-", "w")
    await stack.restart(busy)
    await stack.wait_for_replicas(2, timeout_s=60)


async def which_runs(stack: LocalStack) -> tuple[str, str]:
    from protos import worker_pb2, worker_pb2_grpc

    running = []
    for address in stack.addresses.worker:
        async with grpc.aio.insecure_channel(address) as channel:
            status = await worker_pb2_grpc.WorkerStub(channel).Status(worker_pb2.StatusRequest())
            running.append(status.running)
    assert sorted(running) == [0, 1]
    names = ["worker-0", "worker-1"]
    return (names[0], names[1]) if running[0] else (names[1], names[0])


async def test_killed_worker_is_rescued_without_a_lost_or_repeated_token(stack: LocalStack) -> None:
    whole = await generate(stack.admission_address, request("chatbot", 100, 100, salt=102))
    async with admission(stack.admission_address) as stub:
        started = asyncio.Event()
        running = asyncio.create_task(
            collect(stub.Generate(request("chatbot", 100, 100, salt=102), timeout=60), started)
        )
        await asyncio.wait_for(started.wait(), 30)
        busy, _ = await which_runs(stack)
        await stack.kill(busy)
        reply = await running
    assert reply.ids == whole.ids
    assert reply.finished is not None
    assert reply.finished.attempts == 2
    await stack.restart(busy)
    await stack.wait_for_replicas(2, timeout_s=60)


async def test_planner_outage_means_best_effort_and_not_an_error(stack: LocalStack) -> None:
    from protos import types_pb2

    await stack.kill("planner-0")
    reply = await generate(stack.admission_address, request("chatbot", 100, 5, salt=103))
    assert reply.verdicts[0].kind == types_pb2.VERDICT_KIND_BEST_EFFORT
    assert reply.verdicts[0].constraint.kind == types_pb2.CONSTRAINT_KIND_NO_PLANNER
    assert len(reply.ids) == 5
    rejected = request("chatbot", 100, 5, salt=104, on_infeasible=types_pb2.ON_INFEASIBLE_REJECT)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack.admission_address, rejected)
    assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    await stack.restart("planner-0")
    async with asyncio.timeout(20):
        while True:  # workers find the planner again and send it their whole state
            again = await generate(stack.admission_address, request("chatbot", 100, 5, salt=105))
            if again.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED:
                return


async def test_restarted_redis_still_has_what_it_acknowledged_and_serves_again(stack: LocalStack) -> None:
    import redis.asyncio

    connection = redis.asyncio.from_url(stack.redis_url)
    await connection.set("slos:test:acknowledged", "yes")
    await asyncio.sleep(1.1)  # appendfsync everysec promises what is older than a second
    await connection.aclose()
    await stack.kill("redis")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack.admission_address, request("chatbot", 100, 5, salt=106), timeout_s=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stack.restart("redis")
    connection = redis.asyncio.from_url(stack.redis_url)
    assert await connection.get("slos:test:acknowledged") == b"yes"
    await connection.aclose()
    await stack.wait_for_replicas(2, timeout_s=30)
    reply = await generate(stack.admission_address, request("chatbot", 100, 5, salt=107))
    assert len(reply.ids) == 5


async def test_draining_admission_refuses_new_calls_and_finishes_running_ones(stack: LocalStack) -> None:
    async with admission(stack.admission_address) as stub:
        started = asyncio.Event()
        running = asyncio.create_task(
            collect(stub.Generate(request("chatbot", 100, 60, salt=108), timeout=60), started)
        )
        await asyncio.wait_for(started.wait(), 30)
        ending = asyncio.create_task(stack.terminate("admission-0"))
        reply, status = await asyncio.gather(running, ending)
    assert len(reply.ids) == 60
    assert status == 0

    path = Path(stack.spec.data_dir) / "logs" / "admission-0.log"
    assert "Traceback" not in path.read_text()
