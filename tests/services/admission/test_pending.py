"""A request whose verdict comes from its replica: what its client is told, and when."""

import asyncio
from typing import Any

import grpc.aio
import pytest

from protos import types_pb2
from services.client import Finished, SloServeError, Tokens, Verdict, VerdictChanged
from services.common.errors import Reason
from tests.services.admission.world import ADMITTED, BEST_EFFORT, PENDING, World, generate, soon

LENGTH = types_pb2.FINISH_REASON_LENGTH


def decision(kind: Any, at_us: int = 7, **fields: Any) -> types_pb2.Verdict:
    tier = "loose" if kind == ADMITTED else "best-effort"
    return types_pb2.Verdict(kind=kind, replica_id="w0", tier=tier, decided_at_us=at_us, **fields)


@pytest.mark.parametrize(("kind", "word"), [(ADMITTED, "ADMITTED"), (BEST_EFFORT, "BEST_EFFORT")])
async def test_the_decision_is_a_second_verdict_before_the_first_token(world: World, kind: Any, word: str) -> None:
    world.router.verdict = PENDING
    stream = world.client.generate("Go.", application="chatbot", max_tokens=4)
    first = await anext(stream)
    queued = await world.placed()
    world.worker.emit(queued.request_id, [40, 41], verdict=decision(kind), finish=LENGTH)
    events = [first, *[event async for event in stream]]
    kinds = [event.kind for event in events if isinstance(event, Verdict)]
    assert kinds == ["PENDING", word]
    assert isinstance(events[1], Verdict)
    assert isinstance(events[2], Tokens)
    assert not [event for event in events if isinstance(event, VerdictChanged)]
    assert isinstance(events[-1], Finished)
    assert events[-1].promised == (kind == ADMITTED)


async def test_a_decision_that_is_repeated_is_told_once(world: World) -> None:
    world.router.verdict = PENDING
    stream = world.client.generate("Go.", application="chatbot", max_tokens=4)
    events = [await anext(stream)]
    queued = await world.placed()
    world.worker.emit(queued.request_id, verdict=decision(ADMITTED))
    world.worker.emit(queued.request_id, [40], verdict=decision(ADMITTED), finish=LENGTH)
    events += [event async for event in stream]
    assert [event.kind for event in events if isinstance(event, Verdict)] == ["PENDING", "ADMITTED"]
    assert not [event for event in events if isinstance(event, VerdictChanged)]


async def test_a_decision_may_overtake_the_answer_of_the_placement(world: World) -> None:
    world.router.verdict = PENDING
    world.router.hold_answer = asyncio.Event()
    stream = world.client.generate("Go.", application="chatbot", max_tokens=4)
    first = asyncio.ensure_future(anext(stream))
    queued = await world.placed()
    world.worker.emit(queued.request_id, [40], verdict=decision(ADMITTED), finish=LENGTH)
    session = world.admission.sessions.get(queued.request_id)
    assert session is not None
    await soon(lambda: session.verdict is not None)
    world.router.hold_answer.set()
    events = [await first, *[event async for event in stream]]
    assert [event.kind for event in events if isinstance(event, Verdict)] == ["ADMITTED"]
    assert isinstance(events[-1], Finished)
    assert events[-1].promised


async def test_who_rejects_best_effort_hears_nothing_until_the_promise(world: World) -> None:
    world.router.verdict = PENDING
    call = world.client_of(generate(on_infeasible=types_pb2.ON_INFEASIBLE_REJECT))
    first = asyncio.ensure_future(call.read())
    queued = await world.placed()
    await soon(lambda: _pending(world, queued.request_id))
    assert not first.done()
    world.worker.emit(queued.request_id, verdict=decision(ADMITTED))
    assert (await first).verdict.kind == ADMITTED
    call.cancel()


async def test_a_late_rejection_is_trailers_only_with_the_plans_delay(world: World) -> None:
    world.router.verdict = PENDING
    call = world.client_of(generate(on_infeasible=types_pb2.ON_INFEASIBLE_REJECT))
    first = asyncio.ensure_future(call.read())
    queued = await world.placed()
    await soon(lambda: _pending(world, queued.request_id))
    constraint = types_pb2.Constraint(kind=types_pb2.CONSTRAINT_KIND_HOPELESS, detail="hopeless: too late")
    world.worker.emit(queued.request_id, verdict=decision(BEST_EFFORT, constraint=constraint, retry_after_ms=320))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await first
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "hopeless: too late" in (refused.value.details() or "")
    assert ("grpc-retry-pushback-ms", "320") in {(key, value) for key, value in refused.value.trailing_metadata()}
    assert await call.initial_metadata() is None or not list(await call.initial_metadata())
    await soon(lambda: bool(world.worker.cancels))
    assert (world.worker.cancels[0].request_id, world.worker.cancels[0].reason) == (queued.request_id, "declined")


async def test_a_late_rejection_reaches_the_typed_client(world: World) -> None:
    world.router.verdict = PENDING
    stream = world.client.generate("Go.", application="chatbot", max_tokens=4, on_infeasible="REJECT")
    first = asyncio.ensure_future(anext(stream))
    queued = await world.placed()
    world.worker.emit(queued.request_id, verdict=decision(BEST_EFFORT))
    with pytest.raises(SloServeError) as refused:
        await first
    assert (refused.value.reason, refused.value.retry_after_ms) == (Reason.NO_CAPACITY, 1000)


async def test_the_catalogue_says_when_the_verdict_is_wanted(world: World) -> None:
    call = world.client_of(generate())
    await call.read()
    assert world.router.placed[0].verdict_mode == types_pb2.VERDICT_MODE_EARLY
    call.cancel()


def _pending(world: World, request_id: str) -> bool:
    session = world.admission.sessions.get(request_id)
    return session is not None and session.verdict is not None and session.verdict.kind == PENDING
