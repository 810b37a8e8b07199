from typing import Any

import grpc.aio
import pytest

from protos import router_pb2, types_pb2
from services.common import keys
from services.common.errors import InvalidRequestError, Reason, SloServeError
from services.common.request_record import RequestState
from services.common.stream_entry import decode_entry
from tests.services.router.world import World, error_of, verdict_in

BEST_EFFORT = types_pb2.VERDICT_KIND_BEST_EFFORT
ADMITTED = types_pb2.VERDICT_KIND_ADMITTED
REJECT = types_pb2.ON_INFEASIBLE_REJECT


async def test_the_first_replica_that_promises_gets_the_request(world: World) -> None:
    await world.replica("a", running=8, free_blocks=500)
    await world.replica("b", running=4, free_blocks=700)
    await world.replica("c")
    world.planner.refuse("a")
    world.planner.admit("b")
    response = await world.place(world.request("r"))
    assert [replica_id for replica_id, _ in world.planner.asked] == ["a", "b"]  # the fullest first, none after the yes
    assert (response.verdict.kind, response.replica_id, response.verdict.hops) == (ADMITTED, "b", 2)
    assert [hop.replica_id for hop in response.hops] == ["a", "b"]
    assert response.stream == keys.queue_key("b", "tight")
    [(entry_id, fields)] = await world.redis.xrange(response.stream)
    queued = decode_entry(fields)
    assert entry_id.decode() == response.entry_id
    assert (queued.promised, queued.tier, queued.predicted_ttft_ms) == (True, "tight", 80.0)
    await world.settled()
    assert world.planner.committed == [("b", "r", 1)]
    assert world.planner.released == []
    record = await world.store.get("r")
    assert record is not None
    assert (record.state, record.verdict, record.replica_id) == (RequestState.QUEUED, "admitted", "b")


async def test_the_planner_hears_the_whole_candidate(world: World) -> None:
    await world.replica("a")
    world.planner.admit("a")
    request = world.request("r", prompt_tokens=30)
    request.sampling.max_tokens = 7
    await world.place(request)
    [(_, candidate)] = world.planner.asked
    assert (candidate.prompt_tokens, candidate.max_tokens, candidate.attempt) == (30, 7, 1)
    assert candidate.ttft_deadline_us == request.ttft_deadline_us
    assert list(candidate.stages) == list(request.stages)


async def test_where_nobody_promises_it_runs_as_best_effort_with_the_nearest_reason(world: World) -> None:
    await world.replica("a", running=8)
    await world.replica("b")
    world.planner.refuse("a", predicted_ttft_ms=2000)
    world.planner.refuse("b", predicted_ttft_ms=900)
    response = await world.place(world.request("r"))
    assert (response.verdict.kind, response.replica_id, response.stream) == (BEST_EFFORT, "", keys.BEST_EFFORT_QUEUE)
    assert response.verdict.tier == "best-effort"
    assert response.verdict.constraint.detail == "b is full"
    assert response.verdict.hops == 2
    [(_, fields)] = await world.redis.xrange(keys.BEST_EFFORT_QUEUE)
    assert not decode_entry(fields).promised


async def test_reject_carries_the_verdict_and_the_plans_retry_delay(world: World) -> None:
    await world.replica("a")
    await world.replica("b")
    world.planner.refuse("a", retry_after_ms=700)
    world.planner.refuse("b", retry_after_ms=400, predicted_ttft_ms=800)
    error = await error_of(world.place(world.request("r"), REJECT))
    assert (error.reason, error.code) == (Reason.NO_CAPACITY, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert error.retry_after_ms == 400
    verdict = verdict_in(error)
    assert (verdict.kind, verdict.hops, verdict.constraint.detail) == (types_pb2.VERDICT_KIND_REJECTED, 2, "b is full")
    assert await world.redis.keys("slos:q:*") == []


async def test_without_a_ready_replica_the_call_is_unavailable_for_a_while(world: World) -> None:
    await world.replica("draining", status=router_pb2.REPLICA_STATUS_DRAINING)
    for policy in (types_pb2.ON_INFEASIBLE_BEST_EFFORT, REJECT):
        error = await error_of(world.place(world.request("r"), policy))
        assert (error.reason, error.code) == (Reason.NO_REPLICA, grpc.StatusCode.UNAVAILABLE)
        assert error.retry_after_ms
    assert await world.redis.keys("slos:q:*") == []


async def test_an_absent_planner_means_best_effort_or_rejection_as_the_client_chose(world: World) -> None:
    await world.replica("a")
    await world.replica("b")
    await world.planner_server.stop(0)
    response = await world.place(world.request("soft"))
    assert (response.verdict.kind, response.verdict.constraint.kind) == (
        BEST_EFFORT,
        types_pb2.CONSTRAINT_KIND_NO_PLANNER,
    )
    error = await error_of(world.place(world.request("hard"), REJECT))
    assert error.reason is Reason.PLANNER_UNAVAILABLE
    assert verdict_in(error).kind == types_pb2.VERDICT_KIND_REJECTED
    assert await world.store.get("hard") is None


async def test_a_planner_that_does_not_know_the_replica_costs_only_the_promise(world: World) -> None:
    await world.replica("a")
    world.planner.verdicts["a"] = SloServeError(Reason.REPLICA_UNKNOWN, "replica a has not reported its state yet")
    response = await world.place(world.request("r"))
    assert response.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_NO_PLANNER
    assert "has not reported" in response.verdict.constraint.detail


async def test_a_repeated_place_answers_with_what_the_first_one_did(world: World) -> None:
    await world.replica("a")
    world.planner.admit("a")
    request = world.request("r")
    first = await world.place(request)
    again = await world.place(request)
    assert (again.stream, again.entry_id, again.replica_id, again.verdict.kind) == (
        first.stream,
        first.entry_id,
        "a",
        ADMITTED,
    )
    world.planner.refuse("a")
    third = await world.place(request)  # now it would be best effort; the promise stands
    assert (third.entry_id, third.verdict.kind) == (first.entry_id, ADMITTED)
    assert await world.redis.xlen(first.stream) == 1
    assert await world.redis.xlen(keys.BEST_EFFORT_QUEUE) == 0


async def test_a_reservation_is_freed_where_the_request_was_already_placed_elsewhere(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a")
    request = world.request("r")
    await world.place(request)
    world.planner.admit("a")
    again = await world.place(request)
    assert (again.verdict.kind, again.stream) == (BEST_EFFORT, keys.BEST_EFFORT_QUEUE)
    await world.settled()
    assert (world.planner.released, world.planner.committed) == ([("a", "r", 1)], [])


async def test_a_reservation_is_freed_where_the_client_cancelled_meanwhile(world: World) -> None:
    await world.replica("a")
    world.planner.admit("a")
    await world.store.begin("r", digest="d", admission_id="adm-1", tenant="default", application="coder", arrival_us=1)
    await world.store.cancel("r")
    assert (await error_of(world.place(world.request("r")))).reason is Reason.REQUEST_CANCELLED
    await world.settled()
    assert world.planner.released == [("a", "r", 1)]
    assert await world.redis.keys("slos:q:*") == []


async def test_the_shared_queue_sheds_beyond_its_limit(world: World) -> None:
    await world.replica("a")
    world.planner.refuse("a", retry_after_ms=2300)
    for number in range(3):
        await world.place(world.request(f"r{number}"))
    error = await error_of(world.place(world.request("r3")))
    assert (error.reason, error.retry_after_ms) == (Reason.NO_CAPACITY, 2300)  # when the plan sees room
    assert await world.redis.xlen(keys.BEST_EFFORT_QUEUE) == 3


async def test_a_session_returns_to_the_replica_of_its_earlier_request(world: World) -> None:
    await world.replica("a", running=8)
    await world.replica("b")
    world.planner.refuse("a")
    world.planner.admit("b")
    await world.place(world.request("first"))
    world.planner.admit("a")
    world.planner.asked.clear()
    response = await world.place(world.request("second"), previous_request_id="first")
    assert response.replica_id == "b"
    assert [replica_id for replica_id, _ in world.planner.asked] == ["b"]


async def test_a_prompt_too_long_for_every_replica_names_its_field(world: World) -> None:
    await world.replica("short", max_model_len=64)
    error = await error_of(world.place(world.request("r", prompt_tokens=60)))
    assert isinstance(error, InvalidRequestError)
    assert error.violations[0].field == "request.prompt_token_ids"
    await world.replica("long")
    world.planner.admit("long")
    assert (await world.place(world.request("r", prompt_tokens=60))).replica_id == "long"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("request.request_id", {"request_id": ""}),
        ("request.attempt", {"attempt": 2}),
        ("request.admission_id", {"admission_id": ""}),
        ("request.arrival_us", {"arrival_us": 0}),
        ("request.ttft_deadline_us", {"ttft_deadline_us": 5}),
    ],
)
async def test_a_malformed_request_names_its_field(world: World, field: str, change: dict[str, Any]) -> None:
    request = world.request("r")
    for name, value in change.items():
        setattr(request, name, value)
    error = await error_of(world.place(request))
    assert isinstance(error, InvalidRequestError)
    assert field in [violation.field for violation in error.violations]
    assert world.planner.asked == []


async def test_every_bad_field_of_a_stage_is_named(world: World) -> None:
    request = world.request("r")
    request.stages[1].tier, request.stages[1].tpot_ms, request.stages[0].max_tokens = "golden", -1.0, 0
    del request.prompt_token_ids[:]
    error = await error_of(world.place(request))
    assert isinstance(error, InvalidRequestError)
    assert sorted(violation.field for violation in error.violations) == [
        "request.prompt_token_ids",
        "request.stages[0].max_tokens",
        "request.stages[1].tier",
        "request.stages[1].tpot_ms",
    ]


async def test_a_lost_redis_is_unavailable_and_frees_the_reservation(world: World) -> None:
    await world.replica("a")
    world.planner.admit("a")
    world.server.kill()
    try:
        error = await error_of(world.place(world.request("r")))
    finally:
        world.server.start()
    assert (error.reason, error.code) == (Reason.BROKER_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE)
    assert error.retry_after_ms
    await world.settled()
    assert world.planner.released == [("a", "r", 1)]
    assert (await world.place(world.request("r"))).replica_id == "a"  # the lease is back with the file


async def test_the_fleet_is_listed_as_its_leases_describe_it(world: World) -> None:
    published = [await world.replica("a", running=3), await world.replica("b", max_model_len=64)]
    listed = await world.stub.ListReplicas(router_pb2.ListReplicasRequest(), timeout=5)
    assert list(listed.replicas) == published


@pytest.mark.parametrize("policy", [REJECT, types_pb2.ON_INFEASIBLE_BEST_EFFORT])
async def test_who_comes_too_late_for_an_idle_replica_is_not_asked_about(world: World, policy: Any) -> None:
    await world.replica("a")
    request = world.request("r", ttft_ms=500)
    request.arrival_us -= 490_000
    request.ttft_deadline_us -= 490_000  # 10 ms are left, an idle replica takes 20
    if policy == REJECT:
        error = await error_of(world.place(request, policy))
        verdict = verdict_in(error)
        assert error.reason is Reason.NO_CAPACITY
        assert 490 <= verdict.retry_after_ms < 1500
        assert error.retry_after_ms == pytest.approx(verdict.retry_after_ms, abs=0.01)
    else:
        verdict = (await world.place(request, policy)).verdict
        assert verdict.kind == BEST_EFFORT
    assert verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS
    assert "to the router" in verdict.constraint.detail
    assert not world.planner.asked
