"""What ends a request early: its client, its client's absence, its deadline, a shutdown."""

import asyncio

import grpc
import pytest

from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.admission.tokens import ModelTokens
from services.client import Finished, Reason, SloServeError, Tokens
from services.common.request_record import RequestState
from tests.services.admission.world import BEST_EFFORT, World, generate, ids_of, soon


async def cancelled_in_redis(world: World, request_id: str) -> bool:
    record = await world.store.get(request_id)
    return record is not None and record.state is RequestState.CANCELLED


async def until_cancelled(world: World, request_id: str) -> None:
    async with asyncio.timeout(10):
        while not await cancelled_in_redis(world, request_id):  # noqa: ASYNC110 - state of Redis
            await asyncio.sleep(0.005)


async def test_a_cancel_call_ends_the_stream_and_frees_the_worker(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot", request_id="c-1")
    await anext(stream)
    queued = await world.placed()
    world.worker.emit(queued.request_id, ids_of(tokens, "so far")[:1])
    assert isinstance(await anext(stream), Tokens)
    assert await world.client.cancel("c-1") is True
    finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.output_tokens, finished.met) == ("CANCELLED", 1, False)
    assert [cancel.request_id for cancel in world.worker.cancels] == ["c-1"]
    assert await cancelled_in_redis(world, "c-1")
    assert await world.client.cancel("c-1") is False


async def test_a_client_that_leaves_cancels_its_request(world: World) -> None:
    call = world.stub.Generate(generate(request_id="c-2"))
    await anext(aiter(call))
    await world.placed()
    call.cancel()
    await soon(lambda: [cancel.request_id for cancel in world.worker.cancels] == ["c-2"])
    await until_cancelled(world, "c-2")
    assert world.admission.sessions.get("c-2") is None


async def test_a_queued_request_leaves_the_queue_with_its_client(world: World) -> None:
    world.router.verdict = BEST_EFFORT
    call = world.stub.Generate(generate(request_id="c-3"))
    await anext(aiter(call))
    assert await world.redis.xlen("slos:q:best-effort") == 1
    call.cancel()
    await until_cancelled(world, "c-3")
    assert await world.redis.xlen("slos:q:best-effort") == 0


async def test_a_client_that_leaves_during_placement_leaves_nothing_behind(world: World) -> None:
    world.router.hold = asyncio.Event()
    call = world.stub.Generate(generate(request_id="c-4"))
    await soon(lambda: len(world.router.place_requests) == 1)
    call.cancel()
    await until_cancelled(world, "c-4")
    world.router.hold.set()
    assert world.admission.sessions.get("c-4") is None


async def test_a_passed_deadline_cancels_even_with_a_grace(world: World) -> None:
    with pytest.raises(SloServeError) as late:
        async for _ in world.client.generate("Go.", application="chatbot", timeout_s=1.5, request_id="c-5"):
            await world.placed()
    assert late.value.reason is Reason.CLIENT_DEADLINE
    await until_cancelled(world, "c-5")
    call = world.stub.Generate(generate(request_id="c-6", resume_grace_s=30.0), timeout=1.5)
    await anext(aiter(call))
    assert (await call.code()).name == "DEADLINE_EXCEEDED"
    await until_cancelled(world, "c-6")


async def test_a_grace_does_not_outlast_the_deadline(world: World) -> None:
    call = world.stub.Generate(generate(request_id="c-10", resume_grace_s=30.0), timeout=1.5)
    await anext(aiter(call))
    call.cancel()  # as a client whose own deadline passed an instant before ours
    await soon(lambda: not world.admission.sessions.read())
    await until_cancelled(world, "c-10")


async def test_a_deadline_that_passes_during_placement_is_told_as_such(world: World) -> None:
    world.router.hold = asyncio.Event()
    with pytest.raises(SloServeError) as late:
        await anext(world.client.generate("Go.", application="chatbot", timeout_s=0.3, on_infeasible="WAIT"))
    assert late.value.reason is Reason.CLIENT_DEADLINE
    world.router.hold.set()


async def test_a_cancel_of_nothing_is_not_found(world: World) -> None:
    with pytest.raises(SloServeError) as unknown:
        await world.client.cancel("never-heard-of")
    assert unknown.value.reason is Reason.REQUEST_UNKNOWN
    with pytest.raises(SloServeError) as bad:
        await world.client.cancel("")
    assert bad.value.reason is Reason.INVALID_FIELD


async def test_a_cancel_at_another_process_ends_the_stream_here(world: World) -> None:
    other = await world.start_admission()
    stream = world.client.generate("Go on.", application="chatbot", request_id="c-7")
    await anext(stream)
    await world.placed()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{other.port}") as channel:
        answer = await admission_pb2_grpc.AdmissionStub(channel).Cancel(admission_pb2.CancelRequest(request_id="c-7"))
    assert answer.cancelled
    assert world.worker.cancels[-1].request_id == "c-7"
    finished = [event async for event in stream][-1]  # the sweep notices what Redis says
    assert isinstance(finished, Finished) and finished.reason == "CANCELLED"


async def test_draining_refuses_new_requests_and_finishes_the_running(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go on.", application="chatbot")
    await anext(stream)
    queued = await world.placed()
    drain = asyncio.create_task(world.admission.drain(10))
    await asyncio.sleep(0)
    await soon(lambda: world.admission.draining)
    with pytest.raises(SloServeError) as refused:
        await anext(world.client.generate("Go on.", application="chatbot"))
    assert refused.value.reason is Reason.ADMISSION_DRAINING
    assert refused.value.retry_after_ms is not None
    world.worker.emit(queued.request_id, ids_of(tokens, "done"), finish=types_pb2.FINISH_REASON_STOP)
    finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished) and finished.reason == "STOP"
    await asyncio.wait_for(drain, 10)


async def test_draining_waits_for_a_request_that_is_being_placed(world: World, tokens: ModelTokens) -> None:
    world.router.hold = asyncio.Event()
    stream = world.client.generate("Go on.", application="chatbot")
    first = asyncio.create_task(anext(stream))
    await soon(lambda: len(world.router.place_requests) == 1)
    drain = asyncio.create_task(world.admission.drain(10))
    await soon(lambda: world.admission.draining)
    world.router.hold.set()
    await first
    assert not drain.done()
    queued = await world.placed()
    world.worker.emit(queued.request_id, ids_of(tokens, "done"), finish=types_pb2.FINISH_REASON_STOP)
    assert isinstance([event async for event in stream][-1], Finished)
    await asyncio.wait_for(drain, 10)


async def test_what_outlasts_the_drain_is_told_and_cancelled(world: World) -> None:
    stream = world.client.generate("Go on.", application="chatbot", request_id="c-8")
    await anext(stream)
    await world.placed()
    await world.admission.drain(0.05)
    with pytest.raises(SloServeError) as ended:
        [event async for event in stream]
    assert ended.value.reason is Reason.ADMISSION_DRAINING
    await until_cancelled(world, "c-8")
