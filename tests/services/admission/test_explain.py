"""Explanations: of sessions here, of requests elsewhere, of rejected ones."""

import asyncio

import pytest

from protos import router_pb2, types_pb2
from services.admission.tokens import ModelTokens
from services.client import Constraint, Finished, Reason, SlosClient, SloServeError, Stage, rejected_verdict
from services.common.clock import Clock
from services.common.config import Catalogue, Tenant
from services.common.request_record import RequestState
from tests.services.admission.world import ADMITTED, BEST_EFFORT, PENDING, World, ids_of, soon

STOP = types_pb2.FINISH_REASON_STOP
LIMIT = types_pb2.Constraint(
    kind=types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET,
    needed=900,
    available=200,
    detail="prefill budget: 900 tokens wanted in the next 300 ms, 200 tokens left",
)
FULL = types_pb2.Verdict(kind=BEST_EFFORT, constraint=LIMIT, predicted_ttft_ms=800, ttft_slo_ms=500, tpot_slo_ms=100)


def hop(replica_id: str, verdict: types_pb2.Verdict) -> router_pb2.Hop:
    return router_pb2.Hop(replica_id=replica_id, verdict=verdict)


async def test_a_live_best_effort_request_names_the_constraint_and_its_hops(world: World) -> None:
    world.router.verdict = BEST_EFFORT
    world.router.hops = [hop("w1", types_pb2.Verdict(kind=BEST_EFFORT)), hop("w0", FULL)]
    stream = world.client.generate("Go.", application="chatbot", request_id="e-1")
    await anext(stream)
    said = await world.client.explain("e-1")
    assert (said.state, said.verdict.kind) == ("queued", "BEST_EFFORT")
    assert said.verdict.constraint is not None
    assert (said.verdict.constraint.kind, said.verdict.constraint.needed) == ("PREFILL_BUDGET", 900)
    assert [report.replica_id for report in said.hops] == ["w1", "w0"]
    assert said.why[0] == f"no promise: {LIMIT.detail}"
    await stream.aclose()


async def test_after_the_end_it_tells_what_was_late_and_where_the_time_went(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate(
        "Go.", stages=[Stage(ttft_ms=110, tpot_ms=50)], request_id="e-2", max_tokens=8, ignore_eos=True
    )
    await anext(stream)
    queued = await world.placed()
    arrival_us = queued.arrival_us
    await soon(lambda: Clock().now_us() > arrival_us + 130_000)  # its TTFT passes
    waiting = await world.client.explain("e-2")
    assert "no token after" in waiting.why[-1]
    await world.store.mark("e-2", 1, f"w0/{world.worker.started_us}", first_token_us=Clock().now_us())
    world.worker.emit("e-2", ids_of(tokens, "late"), finish=STOP)
    finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished) and not finished.met
    said = await world.client.explain("e-2")
    assert (said.state, said.stages) == ("finished", finished.stages)
    ttft_ms = finished.stages[0].ttft_ms
    assert f"stage 0 (ANSWER): first token after {ttft_ms:.0f} ms" in said.why[1]
    assert "later than its TTFT of 110 ms" in said.why[1]
    assert "into its queue" in said.why[2]


async def test_while_it_waits_for_room_the_planners_last_refusals_are_told(world: World) -> None:
    world.router.hold, world.router.remembered = asyncio.Event(), [hop("w0", FULL)]
    stream = world.client.generate("Go.", application="chatbot", request_id="e-7", on_infeasible="WAIT")
    waiting = asyncio.create_task(anext(stream))
    await soon(lambda: bool(world.router.place_requests))
    said = await world.client.explain("e-7")
    assert (said.state, said.verdict.kind, said.why[0]) == (
        "new",
        "UNSPECIFIED",
        "no verdict yet: it has not been placed",
    )
    assert [report.verdict.constraint for report in said.hops] == [Constraint("PREFILL_BUDGET", 900, 200, LIMIT.detail)]
    world.router.hold.set()
    await waiting
    assert (await world.client.explain("e-7")).verdict.kind == "ADMITTED"
    await stream.aclose()


async def test_a_failure_of_the_engine_is_told_with_its_reason(world: World) -> None:
    stream = world.client.generate("Go.", application="chatbot", request_id="e-8", resume_grace_s=30)
    await anext(stream)
    await world.placed()
    outcome = types_pb2.FINISH_REASON_ERROR
    world.worker.emit("e-8", finish=outcome, error="CUDA is out of memory")
    with pytest.raises(SloServeError):
        await anext(stream)
    said = await world.client.explain("e-8")
    assert said.state == "failed"
    assert said.why[-1] == "it failed: request e-8 failed on w0: CUDA is out of memory"


async def test_a_kept_promise_says_so(world: World, tokens: ModelTokens) -> None:
    stream = world.client.generate("Go.", stages=[Stage(ttft_ms=9000, tpot_ms=900)], request_id="e-3")
    await anext(stream)
    await world.placed()
    world.worker.emit("e-3", ids_of(tokens, "in time"), finish=STOP)
    _ = [event async for event in stream]
    said = await world.client.explain("e-3")
    assert said.why[0].startswith("promised by w0 at tier loose: first token predicted after 12 of 9000 ms")
    assert said.why[-1] == "every stage met its SLO"


async def test_a_changed_verdict_is_told_with_its_reason(world: World, tokens: ModelTokens) -> None:
    world.router.verdict = BEST_EFFORT
    world.router.hops = [hop("w0", FULL)]
    stream = world.client.generate("Go.", application="chatbot", request_id="e-4")
    await anext(stream)
    await world.placed()
    promoted = types_pb2.Verdict(kind=ADMITTED, replica_id="w0", tier="loose", predicted_ttft_ms=80)
    world.worker.emit("e-4", ids_of(tokens, "go")[:1], verdict=promoted)
    await anext(stream)
    said = await world.client.explain("e-4")
    assert (said.verdict.kind, said.state) == ("ADMITTED", "running")
    assert said.why[0] == f"no promise: {LIMIT.detail}"
    assert said.why[1].startswith("changed after 0 output tokens: promised by w0")
    await stream.aclose()


async def test_a_rejected_request_is_explained_by_the_id_in_its_error(world: World) -> None:
    rejected = types_pb2.Verdict(
        kind=types_pb2.VERDICT_KIND_REJECTED, constraint=LIMIT, predicted_ttft_ms=800, retry_after_ms=700, hops=2
    )
    world.router.error = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=700, details=(rejected,))
    world.router.remembered = [hop("w0", FULL)]
    with pytest.raises(SloServeError) as shed:
        await anext(world.client.generate("Go.", application="chatbot", on_infeasible="REJECT"))
    verdict = rejected_verdict(shed.value)
    said = await world.client.explain(shed.value.metadata["request_id"])
    assert (said.state, said.verdict) == ("rejected", verdict)
    assert [report.replica_id for report in said.hops] == ["w0"]
    assert said.why == (f"rejected: {LIMIT.detail} (2 offers); room was expected 700 ms later",)


async def test_a_rejected_request_that_is_placed_on_a_retry_is_explained_anew(world: World) -> None:
    world.router.error = SloServeError(Reason.NO_CAPACITY, "queue full: 9 waiting, limit 9", retry_after_ms=700)
    with pytest.raises(SloServeError):
        await anext(world.client.generate("Go.", application="chatbot", request_id="e-5"))
    said = await world.client.explain("e-5")
    assert (said.state, said.verdict.retry_after_ms) == ("rejected", 700)
    assert "queue full" in said.why[0]
    world.router.error = None
    stream = world.client.generate("Go.", application="chatbot", request_id="e-5")
    await anext(stream)
    assert (await world.client.explain("e-5")).state == "queued"
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as client:
        assert (await client.explain("e-5")).state == "queued"
    await stream.aclose()


async def test_another_process_explains_from_the_record_and_the_planners(world: World, tokens: ModelTokens) -> None:
    world.router.verdict = BEST_EFFORT
    stream = world.client.generate("Go.", application="chatbot", request_id="e-6")
    await anext(stream)
    await world.placed()
    world.router.remembered = [hop("w1", types_pb2.Verdict(kind=BEST_EFFORT)), hop("w0", FULL)]
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as client:
        said = await client.explain("e-6")
        assert (said.state, said.verdict.kind, said.verdict.tier) == ("claimed", "BEST_EFFORT", "best-effort")
        assert said.verdict.constraint is not None
        assert said.verdict.constraint.detail == LIMIT.detail
        assert len(said.hops) == 2
        owner, record = f"w0/{world.worker.started_us}", await world.store.get("e-6")
        assert record is not None
        late_us = record.times_us["ttft_deadline_us"] + 42_000
        await world.store.mark("e-6", 1, owner, first_token_us=late_us)
        await world.store.finish(
            "e-6", 1, owner, RequestState.FINISHED, stream=record.stream, entry_id=record.entry_id,
            fields={"output_tokens": 5, "ended_us": late_us + 80_000},
        )  # fmt: skip
        ended = await client.explain("e-6")
        world.router.remembered = SloServeError(Reason.PLANNER_UNAVAILABLE, "planner of w0 is away")
        alone = await client.explain("e-6")
    assert ended.state == "finished"
    assert any("42 ms after its deadline" in sentence for sentence in ended.why)
    assert any("into the engine" in sentence for sentence in ended.why)
    assert any("5 tokens at 20.0 ms per token" in sentence for sentence in ended.why)
    assert (alone.verdict.kind, alone.hops) == ("BEST_EFFORT", ())
    assert alone.why[-1] == "the planners could not be asked: planner of w0 is away"
    await stream.aclose()


async def test_unknown_and_foreign_requests_are_not_found(world: World, catalogue: Catalogue) -> None:
    with pytest.raises(SloServeError) as unknown:
        await world.client.explain("never-heard-of")
    assert unknown.value.reason is Reason.REQUEST_UNKNOWN
    with pytest.raises(SloServeError) as malformed:
        await world.client.explain("no such id!")
    assert malformed.value.reason is Reason.INVALID_FIELD
    tenants = {"gold": Tenant(key="gold-key-1"), "free": Tenant(key="free-key-1")}
    keyed = await world.start_admission(catalogue.model_copy(update={"tenants": tenants}))
    other = await world.start_admission(catalogue.model_copy(update={"tenants": tenants}))
    async with (
        SlosClient(f"127.0.0.1:{keyed.port}", key="gold-key-1") as gold,
        SlosClient(f"127.0.0.1:{keyed.port}", key="free-key-1") as free,
        SlosClient(f"127.0.0.1:{other.port}", key="free-key-1") as elsewhere,
    ):
        stream = gold.generate("Go.", application="coder", request_id="t-1")
        await anext(stream)
        assert (await gold.explain("t-1")).state == "queued"
        for client in (free, elsewhere):
            with pytest.raises(SloServeError) as hidden:
                await client.explain("t-1")
            assert hidden.value.reason is Reason.REQUEST_UNKNOWN
        await stream.aclose()


@pytest.mark.parametrize("kept_s", [0, 60], ids=["session gone", "session kept"])
async def test_a_late_rejection_is_explained_with_what_its_replica_found(world: World, kept_s: int) -> None:
    world.router.verdict = PENDING
    world.router.remembered = [hop("w0", FULL)]
    stream = world.client.generate(
        "Go.", application="chatbot", max_tokens=4, on_infeasible="REJECT", resume_grace_s=kept_s
    )
    first = asyncio.ensure_future(anext(stream))
    queued = await world.placed()
    late = types_pb2.Constraint(kind=types_pb2.CONSTRAINT_KIND_HOPELESS, detail="hopeless: too late")
    decision = types_pb2.Verdict(
        kind=BEST_EFFORT, replica_id="w0", constraint=late, retry_after_ms=320, decided_at_us=7
    )
    world.worker.emit(queued.request_id, verdict=decision)
    with pytest.raises(SloServeError) as shed:
        await first
    assert shed.value.metadata["request_id"] == queued.request_id
    other = await world.start_admission()

    async def kept() -> bool:
        record = await world.store.get(queued.request_id)
        return record is not None and "refusal_attempt" in record.fields

    async with asyncio.timeout(10):
        while not await kept():  # noqa: ASYNC110 - a hash in Redis announces nothing
            await asyncio.sleep(0.01)
    async with SlosClient(f"127.0.0.1:{other.port}") as elsewhere:
        for client in (world.client, elsewhere):
            said = await client.explain(queued.request_id)
            assert (said.state, said.verdict.kind, said.verdict.retry_after_ms) == ("rejected", "REJECTED", 320)
            assert said.verdict.constraint is not None
            assert said.verdict.constraint.kind == "HOPELESS"
            assert said.why == ("rejected: hopeless: too late; room was expected 320 ms later",)
            assert [report.replica_id for report in said.hops] == ["w0"]


async def test_a_rejection_does_not_outlive_the_attempt_it_is_about(world: World) -> None:
    world.router.error = SloServeError(Reason.NO_CAPACITY, "full", retry_after_ms=700)
    with pytest.raises(SloServeError):
        await anext(world.client.generate("Go.", application="chatbot", request_id="e-9"))
    world.router.error = None
    stream = world.client.generate("Go.", application="chatbot", request_id="e-9")
    await anext(stream)
    assert await world.client.cancel("e-9")
    other = await world.start_admission()
    async with SlosClient(f"127.0.0.1:{other.port}") as elsewhere:
        assert (await elsewhere.explain("e-9")).state == "cancelled"
    await stream.aclose()
