"""Coming back to a request: after a broken connection, as a retry, here and at another process."""

import asyncio

import pytest

from protos import types_pb2
from services.admission.tokens import ModelTokens
from services.client import Event, Finished, Reason, SlosClient, SloServeError, Tokens, Verdict
from services.common.request_record import RequestState
from tests.services.admission.world import World, generate, ids_of, soon

STOP = types_pb2.FINISH_REASON_STOP


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


async def broken_after(world: World, request_id: str, ids: list[int], **fields: object) -> None:
    """A request with a grace whose client vanished after `ids`."""
    call = world.stub.Generate(generate(request_id=request_id, resume_grace_s=30.0, **fields))
    stream = aiter(call)
    await anext(stream)
    await world.placed()
    world.worker.emit(request_id, ids)
    while (await anext(stream)).WhichOneof("event") != "tokens":
        pass
    call.cancel()
    await soon(lambda: not world.admission.sessions.read())


async def test_with_a_grace_the_request_runs_on_and_is_resumed(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "the quick brown fox jumps over the lazy dog")
    await broken_after(world, "r-1", ids[:3])
    world.worker.emit("r-1", ids[3:6])
    stream = world.client.resume("r-1", 2)
    first = [await anext(stream), await anext(stream)]
    world.worker.emit("r-1", ids[6:], finish=STOP)
    events = first + [event async for event in stream]
    assert isinstance(events[0], Verdict)
    assert isinstance(events[1], Tokens) and events[1].offset == 2
    assert text_of(events) == tokens.decode(ids[2:])
    assert isinstance(events[-1], Finished) and events[-1].output_tokens == len(ids)
    assert not world.worker.cancels


async def test_a_finished_request_is_still_there_for_a_while(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "done while away")
    await broken_after(world, "r-2", ids[:1])
    world.worker.emit("r-2", ids[1:], finish=STOP)
    events = [event async for event in world.client.resume("r-2", 0)]
    assert text_of(events) == "done while away"
    again = [event async for event in world.client.resume("r-2", 0)]
    assert again == events


async def test_without_coming_back_the_grace_ends_the_request(world: World) -> None:
    call = world.stub.Generate(generate(request_id="r-3", resume_grace_s=0.2))
    await anext(aiter(call))
    await world.placed()
    call.cancel()
    await soon(lambda: [cancel.request_id for cancel in world.worker.cancels] == ["r-3"])
    with pytest.raises(SloServeError) as gone:
        async with asyncio.timeout(10):
            while True:
                [event async for event in world.client.resume("r-3", 0)]
    assert gone.value.reason is Reason.REQUEST_UNKNOWN


@pytest.mark.parametrize(
    ("request_id", "from_token", "reason"),
    [("r-4", 99, Reason.RESUME_OUT_OF_RANGE), ("r-none", 0, Reason.REQUEST_UNKNOWN), ("", 0, Reason.INVALID_FIELD)],
)
async def test_a_resume_that_is_not_possible(
    world: World, tokens: ModelTokens, request_id: str, from_token: int, reason: Reason
) -> None:
    await broken_after(world, "r-4", ids_of(tokens, "short"))
    with pytest.raises(SloServeError) as refused:
        await anext(world.client.resume(request_id, from_token))
    assert refused.value.reason is reason


async def test_the_newest_stream_takes_over(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "only one listens")
    first = world.client.generate("Go on.", application="chatbot", request_id="r-5", resume_grace_s=30)
    await anext(first)
    await world.placed()
    second = world.client.resume("r-5", 0)
    await anext(second)
    with pytest.raises(SloServeError, match="took over"):
        await anext(first)
    world.worker.emit("r-5", ids, finish=STOP)
    assert text_of([event async for event in second]) == "only one listens"
    assert not world.worker.cancels


async def test_a_repeated_request_attaches_to_the_first(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "sent once, read twice")
    await broken_after(world, "r-6", ids[:2])
    stream = world.client_of(generate(request_id="r-6", resume_grace_s=30.0))
    world.worker.emit("r-6", ids[2:], finish=STOP)
    events = [event async for event in stream]
    assert next(event.tokens.offset for event in events if event.HasField("tokens")) == 0
    assert "".join(event.tokens.text for event in events) == "sent once, read twice"
    assert len(world.router.placed) == 1


async def test_another_body_under_the_same_id_conflicts(world: World, tokens: ModelTokens) -> None:
    await broken_after(world, "r-7", ids_of(tokens, "mine"))
    with pytest.raises(SloServeError) as conflict:
        await anext(world.client.generate("Something else.", application="chatbot", request_id="r-7"))
    assert conflict.value.reason is Reason.REQUEST_CONFLICT


async def test_a_rejected_request_may_be_tried_again_under_its_id(world: World) -> None:
    world.router.error = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=10)
    with pytest.raises(SloServeError):
        await anext(world.client.generate("Go.", application="chatbot", request_id="r-8"))
    world.router.error = None
    assert isinstance(await anext(world.client.generate("Go.", application="chatbot", request_id="r-8")), Verdict)


async def test_an_ended_request_cannot_be_repeated(world: World) -> None:
    stream = world.client.generate("Go.", application="chatbot", request_id="r-9")
    await anext(stream)
    await stream.aclose()
    await soon(lambda: world.admission.sessions.get("r-9") is None)
    with pytest.raises(SloServeError) as conflict:
        async with asyncio.timeout(10):
            await anext(world.client.generate("Go.", application="chatbot", request_id="r-9"))
    assert conflict.value.reason is Reason.REQUEST_CONFLICT


async def test_another_process_resumes_from_the_workers_memory(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "handed over without a gap END and more")
    sampling = types_pb2.Sampling(max_tokens=64, stop=["END"])
    await broken_after(world, "r-10", ids[:3], sampling=sampling)
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as client:
        stream = client.resume("r-10", 2)
        first = [await anext(stream), await anext(stream)]
        world.worker.emit("r-10", ids[3:])
        events = first + [event async for event in stream]
    assert isinstance(events[0], Verdict) and events[0].kind == "ADMITTED"
    whole = "handed over without a gap "
    assert text_of(events) == whole[len(tokens.decode(ids[:2])) :]
    finished = events[-1]
    assert isinstance(finished, Finished) and finished.reason == "STOP" and finished.stages[0].ttft_ms > 0
    record = await world.store.get("r-10")
    assert record is not None and record.admission_id == world.worker.outputs["r-10"].admission_id


async def test_the_process_left_behind_does_not_cancel_what_moved(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "moved on")
    call = world.stub.Generate(generate(request_id="r-11", resume_grace_s=0.3))
    await anext(aiter(call))
    await world.placed()
    call.cancel()
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as client:
        stream = client.resume("r-11", 0)
        await anext(stream)
        await soon(lambda: world.admission.sessions.get("r-11") is None)
        assert not world.worker.cancels
        world.worker.emit("r-11", ids, finish=STOP)
        assert text_of([event async for event in stream]) == "moved on"


async def test_another_process_resumes_although_the_worker_died_too(world: World, tokens: ModelTokens) -> None:
    heir = await world.start_worker("w1")
    ids = ids_of(tokens, "made again from the start")
    await broken_after(world, "r-13", ids[:3])
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as client:
        stream = client.resume("r-13", 2)
        world.router.replica_id = "w1"
        await world.worker.stop()  # its lease still stands
        assert isinstance(await anext(stream), Verdict)
        await world.worker.lose_lease()
        await soon(lambda: len(world.router.placed) == 2)
        await heir.claim(world.router.placed[-1])
        heir.emit("r-13", ids[len(world.router.replaces[0].delivered_token_ids) :], finish=STOP)
        events = [event async for event in stream]
    assert text_of(events) == tokens.decode(ids[2:])


async def test_another_process_serves_what_finished_meanwhile(world: World, tokens: ModelTokens) -> None:
    ids = ids_of(tokens, "all done by then")
    await broken_after(world, "r-12", ids[:1])
    world.worker.emit("r-12", ids[1:], finish=STOP)
    await world.worker.finish_in_redis("r-12", RequestState.FINISHED)
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as client:
        assert text_of([event async for event in client.resume("r-12", 0)]) == "all done by then"
        with pytest.raises(SloServeError) as beyond:
            await anext(client.resume("r-12", 99))
    assert beyond.value.reason is Reason.RESUME_OUT_OF_RANGE


async def test_the_client_resumes_a_drained_stream_by_itself_elsewhere_or_fails(world: World) -> None:
    stream = world.client.generate("Go.", application="chatbot", resume_grace_s=0.3)
    await anext(stream)
    await world.placed()
    await world.admission.drain(0.01)
    with pytest.raises(SloServeError) as ended:
        await anext(stream)
    assert ended.value.reason is Reason.ADMISSION_DRAINING
    assert not world.worker.cancels  # another process may still resume it
