"""Pending requests in a worker: the scheduler's decision on its way to the client, the record and the planner."""

import math
from typing import Any

from protos import types_pb2, worker_pb2
from services.common.keys import BEST_EFFORT_QUEUE
from services.common.stream_entry import decode_entry
from services.core.constraint import FITS, Constraint, ConstraintKind
from services.core.slo import VerdictMode
from services.worker.engine_api import RequestDecision
from tests.services.worker.worker_world import World, eventually

ADMITTED, BEST_EFFORT = types_pb2.VERDICT_KIND_ADMITTED, types_pb2.VERDICT_KIND_BEST_EFFORT
TPOT = Constraint(ConstraintKind.TPOT, 0.2, 0.1, "s", tier=7)


def pending(world: World, request_id: str, **changes: Any) -> types_pb2.QueuedRequest:
    mode = types_pb2.VERDICT_MODE_EARLY
    return world.request(request_id, promised=False, pending=True, verdict_mode=mode, **changes)


async def submit(world: World, request: types_pb2.QueuedRequest) -> None:
    await world.submit(request, world.queue(request.tier))
    await world.engine.until_running(request.request_id)


def verdicts(world: World, request_id: str) -> list[types_pb2.Verdict]:
    return [chunk.verdict for chunk in world.listener.chunks.get(request_id, []) if chunk.HasField("verdict")]


async def test_it_enters_the_engine_undecided_on_its_tier(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    submission = world.engine.running[unique].submission
    assert (submission.pending, submission.promised, submission.tiers) == (True, False, ("loose",))
    assert submission.verdict_mode is VerdictMode.EARLY


async def test_a_promise_reaches_the_client_the_record_and_the_audit(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    world.engine.report(decided=(RequestDecision(unique, 1, True, 0.25, 0.03, FITS),))
    await eventually(lambda: len(verdicts(world, unique)) == 1)
    [verdict] = verdicts(world, unique)
    assert (verdict.kind, verdict.tier, verdict.replica_id) == (ADMITTED, "loose", world.settings.replica_id)
    assert (verdict.predicted_ttft_ms, verdict.predicted_tpot_ms, verdict.ttft_slo_ms) == (250, 30, 5000)
    await world.until_recorded(unique, verdict="admitted", tier="loose")
    world.engine.step(3)
    await world.listener.end(unique)
    await eventually(lambda: [end for state in world.planner.states for end in state.finished])
    assert [end.promised for state in world.planner.states for end in state.finished] == [True]


async def test_the_loss_of_its_chance_names_the_constraint_and_the_delay(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    lost = RequestDecision(unique, 1, False, math.inf, math.nan, TPOT, "tight", 0.4)
    world.engine.report(decided=(lost,))
    await eventually(lambda: len(verdicts(world, unique)) == 1)
    [verdict] = verdicts(world, unique)
    assert (verdict.kind, verdict.tier, verdict.retry_after_ms) == (BEST_EFFORT, "best-effort", 400)
    assert (verdict.predicted_ttft_ms, verdict.predicted_tpot_ms) == (0, 0)
    assert verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_TPOT
    assert verdict.constraint.tier == "tight"
    assert "tier tight" in verdict.constraint.detail
    await world.until_recorded(unique, verdict="best_effort", tier="best-effort")


async def test_a_first_token_waits_for_the_verdict(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    world.engine.step()
    await eventually(lambda: world.engine.running[unique].outputs.empty())
    assert world.listener.ids.get(unique, []) == []
    world.engine.report(decided=(RequestDecision(unique, 1, True, 0.1, 0.03, FITS),))
    await world.listener.tokens(unique, 1)
    assert [verdict.kind for verdict in verdicts(world, unique)] == [ADMITTED]
    assert world.listener.chunks[unique][0].HasField("verdict")


async def test_without_a_word_of_the_scheduler_it_is_best_effort(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    world.engine.step()
    await world.listener.tokens(unique, 1)
    assert [verdict.kind for verdict in verdicts(world, unique)] == [BEST_EFFORT]
    world.engine.report(decided=(RequestDecision(unique, 1, True, 0.1, 0.03, FITS),))
    world.engine.step(2)
    await world.listener.end(unique)
    assert len(verdicts(world, unique)) == 1


async def test_a_decision_about_another_attempt_is_not_its_own(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    world.engine.report(decided=(RequestDecision(unique, 2, False, 0.1, 0.03, FITS),))
    world.engine.report(decided=(RequestDecision(unique, 1, True, 0.1, 0.03, FITS),))
    await eventually(lambda: bool(verdicts(world, unique)))
    assert [verdict.kind for verdict in verdicts(world, unique)] == [ADMITTED]


async def test_the_last_verdict_is_sent_again_with_an_attach(world: World, unique: str) -> None:
    await submit(world, pending(world, unique))
    world.engine.report(decided=(RequestDecision(unique, 1, True, 0.1, 0.03, FITS),))
    await eventually(lambda: len(verdicts(world, unique)) == 1)
    attach = worker_pb2.AttachRequest(request_id=unique, admission_id=world.listener.admission_id, from_token=0)
    await world.stub.Attach(attach)
    await eventually(lambda: len(verdicts(world, unique)) == 2)
    first, again = verdicts(world, unique)
    assert first == again


async def test_a_drain_hands_it_back_still_undecided(world: World, unique: str) -> None:
    world.engine.hold_back.add(unique)
    await submit(world, pending(world, unique))
    await world.stub.Drain(worker_pb2.DrainRequest(grace_s=1.0))
    [fields] = [fields for _, fields in await world.redis.xrange(BEST_EFFORT_QUEUE) if fields[b"id"] == unique.encode()]
    queued = decode_entry(fields)
    assert (queued.pending, queued.promised, queued.tier, queued.attempt) == (True, False, "best-effort", 2)


async def test_one_from_the_shared_queue_is_told_that_it_has_no_promise(world: World, unique: str) -> None:
    await world.submit(pending(world, unique, tier="best-effort"), BEST_EFFORT_QUEUE)
    await world.engine.until_running(unique)
    assert not world.engine.running[unique].submission.pending
    await eventually(lambda: bool(verdicts(world, unique)))
    assert [verdict.kind for verdict in verdicts(world, unique)] == [BEST_EFFORT]


async def test_the_planner_hears_the_engines_limits(world: World) -> None:
    await eventually(lambda: bool(world.planner.states))
    state = world.planner.states[0]
    assert (state.max_batch_tokens, state.batches_in_flight) == (512, 1)
