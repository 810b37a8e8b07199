"""Requests whose worker is gone: placed again, or ended with a precise status."""

import asyncio

import pytest

from protos import types_pb2
from services.admission.tokens import ModelTokens
from services.client import Event, Finished, Reason, SloServeError, Tokens, VerdictChanged
from services.common import keys
from services.common.registry import ReplicaRegistry
from services.common.request_record import RequestState
from tests.services.admission.world import BEST_EFFORT, World, ids_of, soon

STOP = types_pb2.FINISH_REASON_STOP


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


async def test_a_lost_worker_is_a_pause_not_an_error(world: World, tokens: ModelTokens) -> None:
    heir = await world.start_worker("w1")
    ids = ids_of(tokens, "no token is lost and none comes twice")
    stream = world.client.generate(
        "Go on.", application="chatbot", request_id="l-1", temperature=0.7, presence_penalty=0.5
    )
    await anext(stream)
    await world.placed()
    world.worker.emit("l-1", ids[:4])
    first = [await anext(stream)]
    world.router.replica_id, world.router.verdict = "w1", BEST_EFFORT
    await world.worker.die()
    await soon(lambda: len(world.router.placed) == 2)
    replace = world.router.replaces[0]
    assert (replace.attempt, list(replace.delivered_token_ids)) == (1, ids[:4])
    assert "w0" in replace.reason
    await heir.claim(world.router.placed[-1])
    heir.emit("l-1", ids[4:], finish=STOP)
    events = first + [event async for event in stream]
    assert text_of(events) == "no token is lost and none comes twice"
    (changed,) = [event for event in events if isinstance(event, VerdictChanged)]
    assert changed.verdict.kind == "BEST_EFFORT"
    assert "w0 was lost after 4 output tokens" in changed.reason
    assert "penalties" in changed.reason and "another draw" in changed.reason
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.attempts, finished.replica_id, finished.promised) == (2, "w1", True)
    (replaced,) = world.metric("slos_serve.replacements")
    assert replaced.attributes["slos_serve.outcome"] == "placed"


async def test_greedy_output_says_nothing_about_draws(world: World, tokens: ModelTokens) -> None:
    await world.start_worker("w1")
    stream = world.client.generate("Go on.", application="chatbot", temperature=0)
    await anext(stream)
    queued = await world.placed()
    world.worker.emit(queued.request_id, ids_of(tokens, "so far"))
    await anext(stream)
    world.router.replica_id = "w1"
    await world.worker.die()
    changed = await anext(stream)
    assert isinstance(changed, VerdictChanged)
    assert "draw" not in changed.reason and "penalties" not in changed.reason


async def test_no_place_in_time_is_worker_lost(world: World) -> None:
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-2")
    await anext(stream)
    await world.placed()
    world.router.error = SloServeError(Reason.NO_REPLICA, "no replica is live", retry_after_ms=500)
    await world.worker.die()
    with pytest.raises(SloServeError, match="no replica is live") as lost:
        [event async for event in stream]
    assert lost.value.reason is Reason.WORKER_LOST
    assert lost.value.retry_after_ms == 500
    assert len(world.router.replaces) > 1


async def test_a_request_that_is_only_queued_on_a_lost_replica_is_placed_again(world: World) -> None:
    heir = await world.start_worker("w1")
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-3")
    await anext(stream)
    world.router.replica_id = "w1"
    await world.worker.die()
    changed = await anext(stream)
    assert isinstance(changed, VerdictChanged)
    assert world.router.placed[-1].attempt == 2
    await heir.claim(world.router.placed[-1])


async def test_best_effort_in_the_shared_queue_does_not_care_about_a_lost_replica(
    world: World, tokens: ModelTokens
) -> None:
    heir = await world.start_worker("w1")
    world.router.verdict = BEST_EFFORT
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-4")
    await anext(stream)
    await world.worker.die()
    await heir.claim(world.router.placed[0])
    heir.emit("l-4", ids_of(tokens, "in time"), finish=STOP)
    assert text_of([event async for event in stream]) == "in time"
    assert not world.router.replaces


async def test_somebody_elses_rescue_is_followed(world: World, tokens: ModelTokens) -> None:
    heir = await world.start_worker("w1")
    ids = ids_of(tokens, "rescued by another hand")
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-5")
    await anext(stream)
    queued = await world.placed()
    world.worker.emit("l-5", ids[:2])
    await anext(stream)
    queued.attempt, queued.delivered_token_ids[:] = 2, ids[:2]
    await world.store.enqueue(queued, "slos:q:w1:loose", verdict="admitted", replica_id="w1", giver=world.worker.owner)
    await heir.claim(queued)
    await world.worker.die()
    heir.emit("l-5", ids[2:], finish=STOP)
    events = [event async for event in stream]
    assert text_of(events) == tokens.decode(ids)[len(tokens.decode(ids[:2])) :]
    assert not world.router.replaces


async def test_a_request_that_failed_for_good_ends_with_its_reason(world: World) -> None:
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-6")
    await anext(stream)
    record = await world.store.get("l-6")
    assert record is not None
    reason = "delivered 5 times"
    assert await world.store.bury("l-6", stream=record.stream, entry_id=record.entry_id, reason=reason, deliveries=5)
    with pytest.raises(SloServeError, match="delivered 5 times") as failed:  # the sweep notices
        [event async for event in stream]
    assert failed.value.reason is Reason.ENGINE_FAILED


async def test_output_that_died_with_its_worker_is_worker_lost(world: World) -> None:
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-7")
    await anext(stream)
    await world.placed()
    await world.worker.finish_in_redis("l-7", RequestState.FINISHED)
    await world.worker.die()
    with pytest.raises(SloServeError, match="last tokens are gone") as lost:
        [event async for event in stream]
    assert lost.value.reason is Reason.WORKER_LOST


async def test_a_worker_that_has_its_lease_back_in_time_goes_on_with_the_request(
    world: World, tokens: ModelTokens
) -> None:
    ids = ids_of(tokens, "an outage costs no running request")
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-9")
    await anext(stream)
    await world.placed()
    world.worker.emit("l-9", ids[:2])
    await anext(stream)
    world.router.error = SloServeError(Reason.NO_REPLICA, "no replica is live")
    await world.worker.lose_lease()
    await soon(lambda: world.router.replaces)
    await world.worker.publish()
    world.worker.emit("l-9", ids[2:], finish=STOP)
    events = [event async for event in stream]
    assert [token for event in events if isinstance(event, Tokens) for token in event.ids] == ids[2:]
    assert isinstance(events[-1], Finished)
    assert events[-1].attempts == 1


async def test_a_worker_whose_stream_breaks_has_a_second_to_show_that_it_lives(
    world: World, tokens: ModelTokens
) -> None:
    await world.start_worker("w1")
    stream = world.client.generate("Go on.", application="chatbot", request_id="l-10", temperature=0)
    await anext(stream)
    await world.placed()
    world.worker.emit("l-10", ids_of(tokens, "so far"))
    await anext(stream)
    world.router.replica_id = "w1"
    await world.worker.stop()  # killed: its lease, of many seconds, stands
    changed = await asyncio.wait_for(anext(stream), 3.0)
    assert isinstance(changed, VerdictChanged)
    assert "w0 was lost" in changed.reason


async def test_a_live_worker_renews_a_lease_that_was_cut_short(world: World) -> None:
    registry = ReplicaRegistry(world.redis)
    await registry.doubt("w0", world.worker.started_us + 1, 0.001)  # about an earlier process of that name
    assert await world.redis.pttl(keys.replica_key("w0")) > 1000
    await registry.doubt("w0", world.worker.started_us, 0.9)
    assert 0 < await world.redis.pttl(keys.replica_key("w0")) <= 900
    assert await registry.renew("w0", world.worker.started_us, 30.0)
    assert await world.redis.pttl(keys.replica_key("w0")) > 1000
