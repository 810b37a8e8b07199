from typing import Any

import pytest

from protos import router_pb2, types_pb2
from services.common import keys
from services.common.errors import InvalidRequestError, Reason
from services.common.request_record import RequestState
from services.common.stream_entry import decode_entry
from services.router.candidate import candidate_of
from tests.services.owners import claim
from tests.services.router.world import World, error_of

OWNER = keys.owner_name("a", 1)


async def lost(world: World, request_id: str = "r") -> router_pb2.PlaceResponse:
    """A promised request that replica a ran until it died."""
    response = await running(world, request_id)
    await world.lose("a")
    return response


async def running(world: World, request_id: str = "r") -> router_pb2.PlaceResponse:
    """A promised request that replica a runs."""
    await world.replica("a")
    world.planner.admit("a")
    response = await world.place(world.request(request_id))
    assert await claim(world.store, request_id, 1, OWNER) == 1
    first_token_us = world.clock.now_us()
    assert await world.store.mark(request_id, 1, OWNER, first_token_us=first_token_us)
    return response


async def replace(world: World, request_id: str = "r", attempt: int = 1, **fields: Any) -> router_pb2.PlaceResponse:
    request = router_pb2.ReplaceRequest(request_id=request_id, attempt=attempt, reason="lease gone", **fields)
    response: router_pb2.PlaceResponse = await world.stub.Replace(request, timeout=10)
    return response


async def test_a_lost_request_goes_on_elsewhere_after_what_was_delivered(world: World) -> None:
    old = await lost(world)
    await world.replica("b")
    world.planner.admit("b")
    world.planner.asked.clear()
    response = await replace(world, delivered_token_ids=[70, 71])
    assert (response.attempt, response.replica_id, response.verdict.kind) == (2, "b", types_pb2.VERDICT_KIND_ADMITTED)
    assert [replica_id for replica_id, _ in world.planner.asked] == ["b"]  # the lost one would have been asked last
    [(_, candidate)] = world.planner.asked
    assert (candidate.prompt_tokens, candidate.attempt, candidate.stages[0].max_tokens) == (10, 2, 2)
    [(_, fields)] = await world.redis.xrange(response.stream)
    queued = decode_entry(fields)
    record = await world.store.get("r")
    assert record is not None
    assert list(queued.delivered_token_ids) == [70, 71]
    assert queued.first_token_us == record.times_us["first_token_us"]
    assert candidate.ttft_deadline_us == queued.first_token_us + 2 * 50_000  # token 3 of a 50 ms stage
    assert await world.redis.xlen(old.stream) == 0
    assert not await world.store.mark("r", 1, OWNER)  # the old owner is fenced off
    assert await claim(world.store, "r", 2, keys.owner_name("b", 1)) == 2


async def test_without_a_promise_it_goes_on_as_best_effort_even_if_that_queue_is_full(world: World) -> None:
    await lost(world)
    await world.replica("b")
    world.planner.refuse("b")
    for number in range(3):
        await world.place(world.request(f"other{number}"))
    response = await replace(world, delivered_token_ids=[70])
    assert (response.verdict.kind, response.attempt, response.stream) == (
        types_pb2.VERDICT_KIND_BEST_EFFORT,
        2,
        keys.BEST_EFFORT_QUEUE,
    )
    assert await world.redis.xlen(keys.BEST_EFFORT_QUEUE) == 4


async def test_repeating_it_answers_with_the_attempt_in_force(world: World) -> None:
    await lost(world)
    await world.replica("b")
    world.planner.admit("b")
    first = await replace(world, delivered_token_ids=[70])
    again = await replace(world, delivered_token_ids=[70])
    assert (again.attempt, again.stream, again.entry_id) == (2, first.stream, first.entry_id)
    assert await world.redis.xlen(first.stream) == 1


async def test_delivered_tokens_are_the_whole_output_over_all_attempts(world: World) -> None:
    await lost(world)
    await world.replica("b")
    world.planner.admit("b")
    await replace(world, delivered_token_ids=[70, 71])
    error = await error_of(replace(world, attempt=2, delivered_token_ids=[72]))
    assert isinstance(error, InvalidRequestError)
    assert error.violations[0].field == "delivered_token_ids"
    response = await replace(world, attempt=2, delivered_token_ids=[70, 71, 72])
    [(_, fields)] = await world.redis.xrange(response.stream)
    assert list(decode_entry(fields).delivered_token_ids) == [70, 71, 72]
    assert decode_entry(fields).attempt == 3


async def test_what_a_worker_handed_on_is_continued_even_if_the_caller_has_less(world: World) -> None:
    await lost(world)
    await world.replica("b")
    world.planner.admit("b")
    await replace(world, delivered_token_ids=[70, 71, 72])
    response = await replace(world, attempt=2, delivered_token_ids=[70])
    [(_, fields)] = await world.redis.xrange(response.stream)
    assert list(decode_entry(fields).delivered_token_ids) == [70, 71, 72]


async def test_what_kills_every_worker_fails_and_is_kept_as_a_dead_letter(world: World) -> None:
    await lost(world)
    for attempt, replica_id in ((2, "b"), (3, "c")):
        await world.replica(replica_id)
        world.planner.admit(replica_id)
        assert (await replace(world, attempt=attempt - 1)).attempt == attempt
        assert await claim(world.store, "r", attempt, keys.owner_name(replica_id, 1)) == attempt
        await world.lose(replica_id)
    error = await error_of(replace(world, attempt=3))
    assert error.reason is Reason.ENGINE_FAILED
    [(_, letter)] = await world.redis.xrange(keys.DEAD_LETTERS)
    assert letter[b"id"] == b"r"
    assert b"took 3 workers along: lease gone" in letter[b"reason"]
    record = await world.store.get("r")
    assert record is not None
    assert record.state is RequestState.FAILED
    assert (await error_of(replace(world, attempt=3))).reason is Reason.ENGINE_FAILED


async def test_replicas_that_leave_before_they_take_it_are_not_held_against_a_request(world: World) -> None:
    await lost(world)
    for attempt in range(2, 8):
        await world.replica("b")
        world.planner.admit("b")
        assert (await replace(world, attempt=attempt - 1)).attempt == attempt
        await world.lose("b")


async def test_nobody_takes_a_request_from_a_worker_that_lives(world: World) -> None:
    old = await running(world)
    await world.replica("b")
    world.planner.admit("b")
    error = await error_of(replace(world))
    assert error.reason is Reason.REQUEST_CONFLICT
    assert await world.redis.xlen(old.stream) == 1
    await world.settled()
    assert ("b", "r", 2) in world.planner.released


async def test_the_next_attempt_reports_to_whoever_serves_the_client_now(world: World) -> None:
    await lost(world)
    await world.redis.hset(keys.request_key("r"), "admission", "adm-2")  # resumed there
    await world.replica("b")
    world.planner.admit("b")
    response = await replace(world)
    [(_, fields)] = await world.redis.xrange(response.stream)
    assert decode_entry(fields).admission_id == "adm-2"


async def test_without_a_replica_nothing_changes_and_it_can_be_asked_again(world: World) -> None:
    old = await lost(world)
    error = await error_of(replace(world))
    assert (error.reason, bool(error.retry_after_ms)) == (Reason.NO_REPLICA, True)
    assert await world.redis.xlen(old.stream) == 1
    await world.replica("b")
    world.planner.admit("b")
    assert (await replace(world)).replica_id == "b"


@pytest.mark.parametrize(
    ("state", "reason"),
    [(RequestState.FINISHED, Reason.WORKER_LOST), (RequestState.FAILED, Reason.ENGINE_FAILED)],
)
async def test_what_has_ended_is_not_run_again(world: World, state: RequestState, reason: Reason) -> None:
    placed = await running(world)
    await world.store.finish("r", 1, OWNER, state, stream=placed.stream, entry_id=placed.entry_id)
    assert (await error_of(replace(world))).reason is reason


async def test_what_was_cancelled_is_not_run_again(world: World) -> None:
    await lost(world)
    await world.store.cancel("r")
    assert (await error_of(replace(world))).reason is Reason.REQUEST_CANCELLED


async def test_an_unknown_request_or_attempt_is_not_found(world: World) -> None:
    assert (await error_of(replace(world, "nobody"))).reason is Reason.REQUEST_UNKNOWN
    await lost(world)
    assert (await error_of(replace(world, attempt=5))).reason is Reason.REQUEST_UNKNOWN
    assert isinstance(await error_of(replace(world, attempt=0)), InvalidRequestError)


def test_a_candidate_of_a_later_stage_asks_for_what_is_left_of_it() -> None:
    request = types_pb2.QueuedRequest(
        request_id="r",
        attempt=2,
        prompt_token_ids=[1, 2, 3],
        delivered_token_ids=[10, 99, 11, 12],
        stages=[
            types_pb2.Stage(kind=1, ttft_ms=300, tpot_ms=50, max_tokens=8, end_token_id=99, tier="tight"),
            types_pb2.Stage(kind=3, tpot_ms=100, max_tokens=10, tier="loose"),
        ],
        first_token_us=1_000_000,
        ttft_deadline_us=1_200_000,
    )
    candidate = candidate_of(request)
    [stage] = candidate.stages
    assert (stage.tier, stage.ttft_ms, stage.max_tokens) == ("loose", 0.0, 8)
    assert (candidate.prompt_tokens, candidate.max_tokens) == (7, 14)
    # one token of 50 ms after the first, then three of the next stage, the missing one included
    assert candidate.ttft_deadline_us == 1_000_000 + 50_000 + 3 * 100_000
