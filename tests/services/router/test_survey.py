"""Quotes and explanations over the whole fleet."""

import asyncio

import pytest

from protos import planner_pb2, router_pb2, types_pb2
from services.common.errors import InvalidRequestError, Reason, SloServeError
from tests.services.router.world import World, error_of

ADMITTED = types_pb2.VERDICT_KIND_ADMITTED
BEST_EFFORT = types_pb2.VERDICT_KIND_BEST_EFFORT
UNKNOWN_REPLICA = SloServeError(Reason.REPLICA_UNKNOWN, "replica does not report to this planner")


def fitting(replica_id: str, predicted_ttft_ms: float, **numbers: float) -> planner_pb2.PlanQuoteResponse:
    verdict = types_pb2.Verdict(kind=ADMITTED, replica_id=replica_id, predicted_ttft_ms=predicted_ttft_ms)
    return planner_pb2.PlanQuoteResponse(fits=True, verdict=verdict, **numbers)


def full(replica_id: str, predicted_ttft_ms: float, **numbers: float) -> planner_pb2.PlanQuoteResponse:
    constraint = types_pb2.Constraint(
        kind=types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET, needed=900, available=200, detail=f"{replica_id} is full"
    )
    verdict = types_pb2.Verdict(kind=BEST_EFFORT, predicted_ttft_ms=predicted_ttft_ms, constraint=constraint)
    return planner_pb2.PlanQuoteResponse(fits=False, verdict=verdict, **numbers)


async def quote(world: World, **fields: int) -> router_pb2.RouterQuoteResponse:
    request = world.request("q", **fields)
    response: router_pb2.RouterQuoteResponse = await world.stub.Quote(
        router_pb2.RouterQuoteRequest(request=request), timeout=10
    )
    return response


async def explain(world: World) -> router_pb2.RouterExplainResponse:
    response: router_pb2.RouterExplainResponse = await world.stub.Explain(
        router_pb2.RouterExplainRequest(request_id="r"), timeout=10
    )
    return response


async def test_all_replicas_are_asked_at_once_and_nothing_is_reserved_or_queued(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.replica(name)
        world.planner.quotes[name] = fitting(name, 50)
    world.planner.together = asyncio.Barrier(3)  # answered only if all three are asked before the first answer
    response = await quote(world)
    assert response.fits
    assert sorted(replica_id for replica_id, _ in world.planner.quoted) == ["a", "b", "c"]
    assert sorted(hop.replica_id for hop in response.hops) == ["a", "b", "c"]
    assert response.verdict.hops == 3
    await world.settled()
    assert (world.planner.asked, world.planner.committed, world.planner.released) == ([], [], [])
    assert await world.redis.keys("slos:q:*") == []
    assert await world.redis.keys("slos:req:*") == []


async def test_the_fitting_replica_with_the_earliest_first_token_wins(world: World) -> None:
    await world.replica("a")
    await world.replica("b")
    await world.replica("c")
    world.planner.quotes["a"] = fitting("a", 90, tightest_ttft_ms=80, tightest_tpot_ms=100, earliest_us=2_000)
    world.planner.quotes["b"] = fitting("b", 70, tightest_ttft_ms=65, earliest_us=1_000)
    world.planner.quotes["c"] = full("c", 10, tightest_tpot_ms=50)
    response = await quote(world)
    assert (response.fits, response.verdict.kind, response.verdict.replica_id) == (True, ADMITTED, "b")
    assert (response.tightest_ttft_ms, response.tightest_tpot_ms, response.earliest_us) == (65, 50, 1_000)


async def test_where_none_fits_the_closest_answers_with_its_constraint(world: World) -> None:
    await world.replica("a")
    await world.replica("b")
    world.planner.quotes["a"] = full("a", 3000, tightest_ttft_ms=2500, earliest_us=9_000)
    world.planner.quotes["b"] = full("b", 900, tightest_ttft_ms=2600, tightest_tpot_ms=0, earliest_us=0)
    response = await quote(world)
    assert (response.fits, response.verdict.constraint.detail) == (False, "b is full")
    assert (response.tightest_ttft_ms, response.tightest_tpot_ms, response.earliest_us) == (2500, 0, 9_000)


async def test_the_planner_hears_the_candidate_that_would_be_placed(world: World) -> None:
    await world.replica("a")
    world.planner.quotes["a"] = fitting("a", 50)
    await quote(world, prompt_tokens=30)
    [(_, candidate)] = world.planner.quoted
    assert (candidate.prompt_tokens, candidate.max_tokens, candidate.attempt) == (30, 20, 1)


async def test_a_silent_planner_costs_its_replicas_answer_only(world: World) -> None:
    await world.replica("a")
    await world.replica("b")
    world.planner.quotes["a"] = UNKNOWN_REPLICA
    world.planner.quotes["b"] = full("b", 900)
    response = await quote(world)
    assert response.verdict.constraint.detail == "b is full"
    said = {hop.replica_id: hop.verdict.constraint.kind for hop in response.hops}
    assert said["a"] == types_pb2.CONSTRAINT_KIND_NO_PLANNER


async def test_where_no_planner_answers_the_quote_is_unavailable(world: World) -> None:
    await world.replica("a")
    await world.planner_server.stop(0)
    error = await error_of(quote(world))
    assert error.reason is Reason.PLANNER_UNAVAILABLE
    assert error.retry_after_ms
    error = await error_of(explain(world))
    assert error.reason is Reason.PLANNER_UNAVAILABLE


async def test_without_a_replica_there_is_nobody_to_ask(world: World) -> None:
    await world.replica("draining", status=router_pb2.REPLICA_STATUS_DRAINING)
    error = await error_of(quote(world))
    assert (error.reason, bool(error.retry_after_ms)) == (Reason.NO_REPLICA, True)
    assert world.planner.quoted == []


async def test_a_draining_replica_still_explains(world: World) -> None:
    assert (await error_of(explain(world))).reason is Reason.NO_REPLICA
    await world.replica("a", status=router_pb2.REPLICA_STATUS_DRAINING)
    world.planner.remembered["a"] = types_pb2.Verdict(kind=ADMITTED)
    assert [hop.replica_id for hop in (await explain(world)).hops] == ["a"]


async def test_explain_tells_what_each_planner_said_in_order(world: World) -> None:
    for name in ("a", "b", "c", "d"):
        await world.replica(name)
    constraint = types_pb2.Constraint(kind=types_pb2.CONSTRAINT_KIND_KV_BLOCKS, needed=9, available=3, detail="KV")
    world.planner.remembered["a"] = types_pb2.Verdict(kind=ADMITTED, decided_at_us=20)
    world.planner.remembered["c"] = types_pb2.Verdict(kind=BEST_EFFORT, decided_at_us=10, constraint=constraint)
    world.planner.remembered["d"] = UNKNOWN_REPLICA
    response = await explain(world)
    assert [hop.replica_id for hop in response.hops] == ["c", "a"]
    assert response.hops[0].verdict.constraint == constraint


async def test_a_request_nobody_knows_has_no_hops(world: World) -> None:
    await world.replica("a")
    assert list((await explain(world)).hops) == []


async def test_malformed_questions_name_their_fields(world: World) -> None:
    await world.replica("a", max_model_len=64)
    error = await error_of(quote(world, prompt_tokens=60))
    assert isinstance(error, InvalidRequestError)
    assert error.violations[0].field == "request.prompt_token_ids"
    error = await error_of(world.stub.Quote(router_pb2.RouterQuoteRequest(), timeout=5))
    assert isinstance(error, InvalidRequestError)
    assert "request.request_id" in [violation.field for violation in error.violations]
    error = await error_of(world.stub.Explain(router_pb2.RouterExplainRequest(), timeout=5))
    assert isinstance(error, InvalidRequestError)
    assert [violation.field for violation in error.violations] == ["request_id"]
    assert world.planner.quoted == []


@pytest.mark.parametrize("kind", ["Quote", "Explain"])
async def test_an_unexpected_failure_of_a_planner_is_not_taken_for_no(world: World, kind: str) -> None:
    await world.replica("a")
    broken = SloServeError(Reason.INTERNAL, "unexpected KeyError")
    world.planner.quotes["a"], world.planner.remembered["a"] = broken, broken
    error = await error_of(quote(world) if kind == "Quote" else explain(world))
    assert error.reason is Reason.PLANNER_UNAVAILABLE
    assert "unexpected KeyError" in error.text
