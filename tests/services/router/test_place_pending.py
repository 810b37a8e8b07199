"""Requests that wait for their verdict on a replica: where they wait, and what the others are told."""

from protos import router_pb2, types_pb2
from services.common import keys
from services.common.stream_entry import decode_entry
from tests.services.router.world import World

PENDING = types_pb2.VERDICT_KIND_PENDING
ADMITTED = types_pb2.VERDICT_KIND_ADMITTED


def let_wait(world: World, replica_id: str, *, held: bool, ttft_ms: float = 300.0) -> None:
    """The replica's planner lets it wait; its plan holds it, or not now."""
    verdict = types_pb2.Verdict(
        kind=PENDING, replica_id=replica_id, tier="tight", predicted_ttft_ms=ttft_ms, predicted_tpot_ms=30.0
    )
    if not held:
        verdict.constraint.kind = types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET
    world.planner.verdicts[replica_id] = verdict


async def asked(world: World) -> list[str]:
    return [replica_id for replica_id, _ in world.planner.asked]


async def test_a_pending_request_waits_in_its_replicas_queue(world: World) -> None:
    await world.replica("a")
    let_wait(world, "a", held=True)
    response = await world.place(world.request("r"))
    assert (response.verdict.kind, response.replica_id) == (PENDING, "a")
    assert response.stream == keys.queue_key("a", "tight")
    [(_, fields)] = await world.redis.xrange(response.stream)
    queued = decode_entry(fields)
    assert (queued.pending, queued.promised, queued.tier) == (True, False, "tight")
    record = await world.store.get("r")
    assert record is not None
    assert record.verdict == "pending"
    await world.settled()
    assert world.planner.committed == [("a", "r", 1)]


async def test_a_promise_elsewhere_wins_over_a_place_to_wait(world: World) -> None:
    await world.replica("a", running=8)
    await world.replica("b")
    let_wait(world, "a", held=False)
    world.planner.admit("b")
    response = await world.place(world.request("r"))
    assert (response.verdict.kind, response.replica_id, response.verdict.hops) == (ADMITTED, "b", 2)
    await world.settled()
    assert world.planner.released == [("a", "r", 1)]
    assert world.planner.committed == [("b", "r", 1)]


async def test_the_first_plan_that_holds_it_ends_the_round(world: World) -> None:
    await world.replica("a", running=8)
    await world.replica("b", running=4)
    await world.replica("c")
    let_wait(world, "a", held=False, ttft_ms=100)
    let_wait(world, "b", held=True)
    response = await world.place(world.request("r"))
    assert await asked(world) == ["a", "b"]
    assert (response.verdict.kind, response.replica_id) == (PENDING, "b")


async def test_where_no_plan_holds_it_now_the_soonest_gets_it(world: World) -> None:
    await world.replica("a", running=8)
    await world.replica("b", running=4)
    await world.replica("c")
    let_wait(world, "a", held=False, ttft_ms=900)
    let_wait(world, "b", held=False, ttft_ms=400)
    world.planner.refuse("c")
    response = await world.place(world.request("r"), types_pb2.ON_INFEASIBLE_REJECT)
    assert (response.verdict.kind, response.replica_id) == (PENDING, "b")
    await world.settled()
    assert world.planner.released == [("a", "r", 1)]


async def test_the_planner_hears_the_verdict_mode_and_a_waiting_client_waits_at_the_router(world: World) -> None:
    await world.replica("a")
    world.planner.admit("a")
    for name, policy in [("early", types_pb2.ON_INFEASIBLE_BEST_EFFORT), ("waits", types_pb2.ON_INFEASIBLE_WAIT)]:
        request = world.request(name)
        request.verdict_mode = types_pb2.VERDICT_MODE_EARLY
        await world.place(request, policy)
    modes = [candidate.verdict_mode for _, candidate in world.planner.asked]
    assert modes == [types_pb2.VERDICT_MODE_EARLY, types_pb2.VERDICT_MODE_FIRM]


async def test_a_repeated_call_learns_that_the_request_is_pending(world: World) -> None:
    await world.replica("a")
    let_wait(world, "a", held=True)
    first = await world.place(world.request("r"))
    again = await world.place(world.request("r"))
    assert (again.verdict.kind, again.entry_id) == (PENDING, first.entry_id)
    assert (again.verdict.replica_id, again.verdict.tier) == ("a", "tight")


async def test_a_lost_pending_request_is_decided_by_its_next_placement(world: World) -> None:
    await world.replica("a")
    let_wait(world, "a", held=True)
    request = world.request("r")
    request.verdict_mode = types_pb2.VERDICT_MODE_EARLY
    await world.place(request)
    world.planner.refuse("a")
    replace = router_pb2.ReplaceRequest(request_id="r", attempt=1, reason="gone")
    response = await world.stub.Replace(replace, timeout=10)
    assert response.verdict.kind == types_pb2.VERDICT_KIND_BEST_EFFORT
    assert world.planner.asked[-1][1].verdict_mode == types_pb2.VERDICT_MODE_FIRM
    [(_, fields)] = await world.redis.xrange(keys.BEST_EFFORT_QUEUE)
    assert not decode_entry(fields).pending
