import math

import grpc
import pytest

from protos import planner_pb2, types_pb2
from services.planner.audit import Cause
from services.planner.ledger import Ledger
from tests.services.planner.planner_messages import a_candidate, a_request, a_state


def known(ledger: Ledger) -> tuple[object, ...]:
    """Everything a state may change."""
    view = ledger.view()
    capacity = (view.free_blocks, view.total_blocks, view.block_size, view.max_num_seqs, ledger.max_batch_tokens)
    held = ledger.reservation(("promised", 1))
    return dict(ledger.entries), capacity, view.model, ledger.drafts, held, ledger.attempt("r2")


async def test_a_gap_changes_nothing_and_asks_for_one_snapshot(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us, requests=[a_request(now_us, "r1")])) as stream:
        for seq in (3, 4):
            lost = a_state(now_us, seq, full=False, requests=[a_request(now_us, f"r{seq}")])
            await stream.send(lost)
        assert (await stream.next()).HasField("send_snapshot")
        ledger = planner.fleet.get("gpu-0").ledger
        assert set(ledger.entries) == {"r1"}
        await stream.send(a_state(now_us, 5, requests=[a_request(now_us, "r4")]))
        await planner.until(lambda: set(ledger.entries) == {"r4"})
        await stream.send(a_state(now_us, 7, full=False))
        directive = await stream.next()
    assert directive.HasField("send_snapshot")
    assert directive.seq == 2 + len(stream.parameters)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"seq": 1}, "stale"),
        ({"free_blocks": 1001}, "1001 of 1000 blocks"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=float("nan"))])}, "k_tok"),
        ({"perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=-1e-5)])}, "k_tok"),
        ({"observed_at_us": 1 << 60}, "not in the past"),
        ({"engine_free_at_us": 1 << 60}, "no batch lasts that long"),
        ({"requests": [planner_pb2.EngineRequest(request_id="r2", tier="snug")]}, "tier 'snug' is not configured"),
        ({"requests": [planner_pb2.EngineRequest(request_id="r2", tier="tight", tpot_ms=50)]}, "deadline"),
        ({"perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=1, b=math.inf)])}, "coefficient b"),
        ({"perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(b=1)])}, "must grow with tokens"),
        ({"perf_model": types_pb2.PerfModel()}, "must grow with tokens"),
        ({"perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=1)], margin_s=math.nan)}, "margin_s"),
        ({"perf_model": types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=1)], r2=math.nan)}, "r2"),
        ({"block_size": 0}, "of 0 tokens"),
        ({"total_blocks": 0}, "of 0 blocks"),
        ({"observed_at_us": 0}, "not in the past"),
        ({"replica_id": "gpu-1"}, "gpu-1"),
        ({"requests": [planner_pb2.EngineRequest(request_id="r2", tier="loose", tpot_ms=math.nan)]}, "tpot_ms is nan"),
        ({"requests": [planner_pb2.EngineRequest(tier="best-effort")]}, "'' is empty"),
        ({"requests": 2 * [planner_pb2.EngineRequest(request_id="r2", tier="best-effort")]}, "listed twice"),
        ({"drafts": planner_pb2.Drafts(max_verify_tokens=11)}, "11 tokens verified per step"),
        ({"drafts": planner_pb2.Drafts(max_verify_tokens=4, acceptance={"coder": math.nan})}, "'coder' is nan"),
        ({"drafts": planner_pb2.Drafts(max_verify_tokens=4, acceptance={"coder": -0.1})}, "'coder' is -0.1"),
        ({"drafts": planner_pb2.Drafts(max_verify_tokens=4, acceptance={"a": 0.5, "b": 1.1})}, "'b' is 1.1"),
        ({"drafts": planner_pb2.Drafts(max_verify_tokens=4, acceptance={"coder": math.inf})}, "'coder' is inf"),
        ({"removed_ids": ["r2"], "requests": [planner_pb2.EngineRequest(request_id="r2", tier="best-effort")]}, "r2"),
    ],
)
async def test_a_state_that_cannot_be_true_ends_the_stream_and_changes_nothing(planner, fields, named) -> None:
    now_us = planner.clock.now_us()
    drafts = planner_pb2.Drafts(max_verify_tokens=4, acceptance={"chatbot": 0.5})
    async with planner.worker(a_state(now_us, requests=[a_request(now_us, "r1")], drafts=drafts)) as stream:
        await planner.admit(a_candidate(now_us, "promised"))
        ledger = planner.fleet.get("gpu-0").ledger
        before = known(ledger)
        await stream.send(a_state(now_us, **{"seq": 2, "full": False, "free_blocks": 7, **fields}))
        error = await stream.refused()
        assert known(ledger) == before
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert named in error.details()
    assert not ledger.ready  # nothing is promised until the worker is back with a full state


async def test_a_stream_that_begins_with_a_delta_is_asked_for_everything(planner) -> None:
    async with planner.worker() as stream:
        await stream.send(a_state(planner.clock.now_us(), full=False))
        assert (await stream.next()).HasField("send_snapshot")
        assert not planner.ready()


async def test_a_full_state_needs_a_performance_model(planner) -> None:
    state = a_state(planner.clock.now_us())
    state.ClearField("perf_model")
    async with planner.worker() as stream:
        await stream.send(state)
        assert "performance model" in (await stream.refused()).details()


async def test_nothing_is_promised_while_the_stream_is_broken_and_promises_survive_its_return(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        await planner.admit(a_candidate(now_us, "r1"))
    await planner.until(lambda: not planner.ready())
    [broken] = await planner.admit(a_candidate(now_us, "r2"))
    assert broken.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_NO_STATE
    assert "broke" in broken.verdict.constraint.detail
    async with planner.worker(a_state(now_us)):
        assert planner.fleet.get("gpu-0").ledger.reservation(("r1", 1)) is not None
    await planner.until(lambda: planner.fleet.find("gpu-0") is None)  # forgotten after forget_s


async def test_a_newer_stream_takes_over_and_the_older_is_ended(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)) as old, planner.worker(a_state(now_us, total_blocks=2000)):
        await planner.until(lambda: planner.fleet.get("gpu-0").connection == 2)
        await old.send(a_state(now_us, 2, full=False))
        assert "newer stream" in (await old.refused()).details()
        assert planner.ready()


async def test_waiting_best_effort_is_promoted_once_it_fits(planner) -> None:
    now_us = planner.clock.now_us()
    waiting = a_request(
        now_us,
        "waits",
        tier="best-effort",
        promised=False,
        started=False,
        output_tokens=0,
        computed_tokens=0,
        ttft_deadline_us=now_us + 2_000_000,
    )
    busy = a_state(now_us, requests=[a_request(now_us, "runs"), waiting], max_num_seqs=1)
    async with planner.worker(busy) as stream:
        await planner.until(lambda: len(planner.runs) == 1)  # it was tried, and did not fit
        ledger = planner.fleet.get("gpu-0").ledger
        assert ledger.reservation(("waits", 1)) is None
        seq = 2
        while True:  # the worker goes on reporting; a promotion is considered now and then
            state = a_state(now_us, seq, full=False, removed_ids=["runs"], max_num_seqs=1)
            await stream.send(state)
            seq += 1
            if len(planner.runs) > 1:
                break
            await planner.until(lambda: planner.clock.now_us() % 7 == 0)
        directive = await stream.next()
    assert directive.promote.request_id == "waits"
    assert (directive.promote.attempt, directive.promote.tier) == (1, "loose")
    assert directive.promote.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED


async def test_releasing_what_the_engine_already_has_tells_the_worker(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us, requests=[a_request(now_us, "r1")])) as stream:
        await planner.stub.Release(planner_pb2.ReleaseRequest(replica_id="gpu-0", request_id="r1", attempt=1))
        directive = await stream.next()
    assert (directive.release.request_id, directive.release.attempt) == ("r1", 1)


async def test_ended_promises_are_counted_by_cause_and_teach_the_forecast(planner) -> None:
    now_us = planner.clock.now_us()
    ends = [
        planner_pb2.FinishedLength(
            request_id=f"r{n}", application="chatbot", prompt_tokens=200, output_tokens=7, promised=True, met=n > 0,
            missed="" if n else "tpot",
        )
        for n in range(9)
    ]  # fmt: skip
    async with planner.worker(a_state(now_us, finished=ends)):
        await planner.admit(a_candidate(now_us, "new"))
    assert sorted((o.kept, o.missed, o.cause) for o in planner.outcomes) == [
        (False, "tpot", "unplanned"),  # a promise this planner knows nothing of
        *8 * [(True, "", "")],
    ]
    assert planner.runs[0].candidates[0].output_tokens == 7


async def test_a_broken_promise_names_what_broke_it(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)) as stream:
        await planner.admit(a_candidate(now_us, "r1"), a_candidate(now_us, "r2"))
        await stream.send(a_state(now_us, 2, full=False, requests=[a_request(now_us, "r1")]))
        ends = [
            planner_pb2.FinishedLength(request_id=name, application="chatbot", promised=True, missed=missed)
            for name, missed in (("r1", "ttft"), ("r2", "failed"))
        ]
        await stream.send(a_state(now_us, 3, full=False, finished=ends))
        await planner.until(lambda: len(planner.outcomes) == 2)
    assert [(o.missed, o.cause) for o in planner.outcomes] == [("ttft", Cause.ENGINE), ("failed", Cause.FAILED)]
