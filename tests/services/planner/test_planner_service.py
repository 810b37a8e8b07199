import asyncio

import grpc
import grpc.aio
import pytest

from protos import planner_pb2, types_pb2
from tests.services.planner.planner_messages import a_candidate, a_request, a_state

ADMITTED, BEST_EFFORT = types_pb2.VERDICT_KIND_ADMITTED, types_pb2.VERDICT_KIND_BEST_EFFORT


async def test_an_idle_replica_promises_with_a_prediction_and_a_reservation(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        [answer] = await planner.admit(a_candidate(now_us, "r1"))
    verdict = answer.verdict
    assert (verdict.kind, verdict.replica_id, verdict.tier) == (ADMITTED, "gpu-0", "loose")
    assert 30 < verdict.predicted_ttft_ms < 1000  # 200 tokens take 34 ms on this model
    assert (verdict.ttft_slo_ms, verdict.tpot_slo_ms) == (1000, 100)
    assert 0 < answer.reserved_until_us - verdict.decided_at_us <= 2_100_000


async def test_a_repeated_call_gets_the_same_promise_and_reserves_once(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        first = await planner.admit(a_candidate(now_us, "r1"))
        again = await planner.admit(a_candidate(now_us, "r1"))
    assert again == first
    assert len(planner.runs) == 1


async def test_a_reservation_takes_room_until_it_is_released(planner) -> None:
    now_us = planner.clock.now_us()
    release = planner_pb2.ReleaseRequest(replica_id="gpu-0", request_id="r1", attempt=1)
    async with planner.worker(a_state(now_us, max_num_seqs=1)):
        [first] = await planner.admit(a_candidate(now_us, "r1"))
        [second] = await planner.admit(a_candidate(now_us, "r2"))
        await planner.stub.Release(release)
        [third] = await planner.admit(a_candidate(now_us, "r2"))
    assert [answer.verdict.kind for answer in (first, second, third)] == [ADMITTED, BEST_EFFORT, ADMITTED]
    assert second.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_MAX_SEQS
    assert (second.verdict.constraint.needed, second.verdict.constraint.available) == (2, 1)
    assert second.reserved_until_us == 0


async def test_many_calls_at_once_are_all_answered_once(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        answers = await asyncio.gather(*(planner.admit(a_candidate(now_us, f"r{n}")) for n in range(16)))
    assert all(answer.verdict.kind == ADMITTED for [answer] in answers)
    assert sorted(p.id for run in planner.runs for p in run.candidates) == sorted(f"r{n}" for n in range(16))


async def test_what_can_never_be_in_time_is_hopeless_with_numbers(planner) -> None:
    now_us = planner.clock.now_us()
    late = a_candidate(now_us, "r1", ttft_ms=290, prompt_tokens=4000)  # 300 ms of prefill
    async with planner.worker(a_state(now_us)):
        [answer] = await planner.admit(late)
        explained = await planner.stub.Explain(planner_pb2.PlanExplainRequest(replica_id="gpu-0", request_id="r1"))
    assert answer.verdict.kind == BEST_EFFORT
    constraint = answer.verdict.constraint
    assert constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS
    assert constraint.needed > constraint.available > 0
    assert "ms" in constraint.detail
    assert explained.verdict == answer.verdict


async def test_a_replica_never_heard_from_gets_no_promise(planner) -> None:
    [answer] = await planner.admit(a_candidate(planner.clock.now_us(), "r1"), replica_id="gpu-7")
    assert answer.verdict.kind == BEST_EFFORT
    assert answer.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_NO_STATE
    assert "gpu-7" in answer.verdict.constraint.detail
    assert planner.runs == []


async def test_a_promise_seen_in_the_state_ends_its_reservation_but_not_its_place(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us, max_num_seqs=1)) as stream:
        await planner.admit(a_candidate(now_us, "r1"))
        commit = planner_pb2.CommitRequest(replica_id="gpu-0", request_id="r1", attempt=1)
        committed = await planner.stub.Commit(commit)
        await stream.send(a_state(now_us, 2, full=False, requests=[a_request(now_us, "r1")], max_num_seqs=1))
        ledger = planner.fleet.get("gpu-0").ledger
        await planner.until(lambda: ledger.running == 1)
        assert ledger.reservation(("r1", 1)) is None
        [full] = await planner.admit(a_candidate(now_us, "r2"))
        [again] = await planner.admit(a_candidate(now_us, "r1"))
    assert committed.committed
    assert full.verdict.kind == BEST_EFFORT
    assert again.verdict.kind == ADMITTED


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt_tokens": 0}, "candidates[0].prompt_tokens"),
        ({"attempt": 0}, "candidates[0].attempt"),
        ({"cached_tokens": 201}, "candidates[0].cached_tokens"),
        ({"ttft_deadline_us": 1}, "candidates[0].ttft_deadline_us"),
        ({"ttft_deadline_us": 1 << 62}, "candidates[0].ttft_deadline_us"),
        ({"request_id": ""}, "candidates[0].request_id"),
        ({"prompt_tokens": 1 << 31}, "candidates[0].prompt_tokens"),
        ({"max_tokens": 1 << 31}, "candidates[0].max_tokens"),
        ({"arrival_us": 1 << 60, "ttft_deadline_us": (1 << 60) + 1}, "candidates[0].arrival_us"),
        ({"stages": []}, "candidates[0].stages"),
        ({"stages": [types_pb2.Stage(tpot_ms=100, tier="loose")]}, "max_tokens must be at least 1"),
        ({"stages": [types_pb2.Stage(tpot_ms=-1, max_tokens=8, tier="loose")]}, "tpot_s"),
        ({"stages": [types_pb2.Stage(ttft_ms=float("nan"), tpot_ms=100, tier="loose")]}, "ttft_s"),
        ({"stages": [types_pb2.Stage(tpot_ms=100, max_tokens=8, tier="best-effort")]}, "candidates[0].stages[0].tier"),
        ({"stages": [types_pb2.Stage(tpot_ms=100, max_tokens=8, tier="snug")]}, "tier 'snug' is not configured"),
        ({"stages": [types_pb2.Stage(tpot_ms=60, max_tokens=8, tier="loose")]}, "candidates[0].stages[0].tier"),
        ({"stages": [types_pb2.Stage(tpot_ms=float("nan"), max_tokens=8, tier="loose")]}, "tpot_s"),
    ],
)
async def test_a_malformed_candidate_is_refused_by_name_and_reserves_nothing(planner, fields, named) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await planner.admit(a_candidate(now_us, "r1", **fields), a_candidate(now_us, "r2"))
        assert planner.fleet.get("gpu-0").ledger.reservation(("r2", 1)) is None
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert named in refused.value.details()
    assert planner.runs == []


async def test_a_deadline_before_the_requests_own_arrival_is_refused(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        with pytest.raises(grpc.aio.AioRpcError, match="before the request's own arrival") as refused:
            await planner.admit(a_candidate(now_us, "r1", ttft_deadline_us=now_us - 1))
        assert planner.fleet.get("gpu-0").ledger.attempt("r1") == 0
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_deadline_that_passed_on_the_way_is_hopeless_and_reserves_nothing(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        late = a_candidate(now_us, "r1", arrival_us=now_us - 2_000_000, ttft_deadline_us=now_us - 1_000_000)
        [answer] = await planner.admit(late)
        assert planner.fleet.get("gpu-0").ledger.reservation(("r1", 1)) is None
    assert (answer.verdict.kind, answer.reserved_until_us) == (BEST_EFFORT, 0)
    assert answer.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS


async def test_too_many_candidates_or_no_replica_are_refused(planner) -> None:
    now_us = planner.clock.now_us()
    crowd = [a_candidate(now_us, f"r{n}") for n in range(1025)]
    for candidates, replica_id, named in ((crowd, "gpu-0", "at most 1024"), (crowd[:1], "", "replica_id")):
        with pytest.raises(grpc.aio.AioRpcError, match=named) as refused:
            await planner.admit(*candidates, replica_id=replica_id)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_older_attempt_is_refused(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        await planner.admit(a_candidate(now_us, "r1", attempt=2))
        with pytest.raises(grpc.aio.AioRpcError, match="attempt 1 of request r1 is stale") as refused:
            await planner.admit(a_candidate(now_us, "r1", attempt=1))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("call", ["Commit", "Release", "Explain", "Quote"])
async def test_calls_about_an_unknown_replica_say_so(planner, call) -> None:
    now_us = planner.clock.now_us()
    requests = {
        "Commit": planner_pb2.CommitRequest(replica_id="gpu-9", request_id="r1", attempt=1),
        "Release": planner_pb2.ReleaseRequest(replica_id="gpu-9", request_id="r1", attempt=1),
        "Explain": planner_pb2.PlanExplainRequest(replica_id="gpu-9", request_id="r1"),
        "Quote": planner_pb2.PlanQuoteRequest(replica_id="gpu-9", candidate=a_candidate(now_us, "r1")),
    }
    with pytest.raises(grpc.aio.AioRpcError, match="gpu-9") as refused:
        await getattr(planner.stub, call)(requests[call])
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_declined_request_is_told_when_the_plan_has_room(planner) -> None:
    now_us = planner.clock.now_us()
    running = a_request(now_us, "runs", forecast_tokens=20)  # 20 tokens at 100 ms each
    async with planner.worker(a_state(now_us, requests=[running], max_num_seqs=1)):
        [answer] = await planner.admit(a_candidate(now_us, "r1"))
    assert answer.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_MAX_SEQS
    assert 500 < answer.verdict.retry_after_ms <= 2500


async def test_the_way_to_the_engine_is_measured_and_taken_off_the_deadlines_to_come(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)) as stream:
        [first] = await planner.admit(a_candidate(now_us, "r1"))
        later_us = planner.clock.now_us() + 300_000
        arrived = a_request(now_us, "r1", output_tokens=0, computed_tokens=0, accepted_at_us=later_us)
        await stream.send(a_state(later_us, 2, full=False, requests=[arrived]))
        ledger = planner.fleet.get("gpu-0").ledger
        await planner.until(lambda: ledger.running == 1)
        [second] = await planner.admit(a_candidate(now_us, "r2"))
        [hasty] = await planner.admit(a_candidate(now_us, "r3", ttft_ms=320))
    assert ledger.transit.seconds(planner.clock.now_s()) == pytest.approx(0.3, abs=0.1)
    assert first.verdict.predicted_ttft_ms + 200 < second.verdict.predicted_ttft_ms < 1000
    assert hasty.verdict.kind == BEST_EFFORT


async def test_a_first_token_that_a_batch_of_best_effort_would_make_late_is_not_promised(planner) -> None:
    now_us = planner.clock.now_us()
    best_effort = {"tier": "best-effort", "promised": False, "started": False, "computed_tokens": 0, "output_tokens": 0}
    waits = a_request(now_us, "long", prompt_tokens=6000, ttft_deadline_us=0, next_deadline_us=0, **best_effort)
    async with planner.worker(a_state(now_us, engine_free_at_us=now_us, requests=[waits])):
        # The engine forms its next batch before the request arrives, and nothing shortens it: 0.44 s of best effort.
        [hasty] = await planner.admit(a_candidate(planner.clock.now_us(), "r1", ttft_ms=300))
        [patient] = await planner.admit(a_candidate(planner.clock.now_us(), "r2", ttft_ms=2000))
        # From now on batches are short, because there is a promise to keep.
        [later] = await planner.admit(a_candidate(planner.clock.now_us(), "r3", ttft_ms=300))
    assert [answer.verdict.kind for answer in (hasty, patient, later)] == [BEST_EFFORT, ADMITTED, ADMITTED]


async def test_what_reached_the_engine_in_time_is_the_engines_to_keep_whatever_slip_was_planned(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)) as stream:
        await planner.admit(a_candidate(now_us, "r1", ttft_ms=5_000))
        arrived = a_request(now_us, "r1", output_tokens=0, computed_tokens=0)
        await stream.send(a_state(now_us + 3_000_000, 2, full=False, requests=[arrived]))  # a slip of three seconds
        await planner.until(lambda: planner.fleet.get("gpu-0").ledger.running == 1)
        asked_us = planner.clock.now_us()
        [answer] = await planner.admit(a_candidate(asked_us, "r2", ttft_ms=10_000))
        seen = a_request(asked_us, "r2", output_tokens=0, computed_tokens=0)
        await stream.send(a_state(asked_us + 8_500_000, 3, full=False, requests=[seen]))  # 1.5 s before it was due
        end = planner_pb2.FinishedLength(request_id="r2", application="chatbot", promised=True, missed="ttft")
        await stream.send(a_state(asked_us + 12_000_000, 4, full=False, finished=[end]))
        await planner.until(lambda: bool(planner.outcomes))
    assert answer.verdict.kind == ADMITTED
    assert [(outcome.missed, outcome.cause) for outcome in planner.outcomes] == [("ttft", "engine")]


async def test_a_quote_promises_nothing_and_names_what_would_fit(planner) -> None:
    now_us = planner.clock.now_us()
    long_prompt = a_candidate(now_us, "r1", ttft_ms=150, prompt_tokens=4000)  # 280 ms of prefill and more
    ask = planner_pb2.PlanQuoteRequest(replica_id="gpu-0", candidate=long_prompt)
    async with planner.worker(a_state(now_us)):
        quote = await planner.stub.Quote(ask)
        later_us = planner.clock.now_us()
        fitting = a_candidate(later_us, "r2", ttft_ms=quote.tightest_ttft_ms + 500, prompt_tokens=4000)
        [answer] = await planner.admit(fitting)
        assert planner.fleet.get("gpu-0").ledger.reservation(("r1", 1)) is None
    assert not quote.fits
    assert quote.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS
    assert 280 < quote.tightest_ttft_ms < 1000
    assert quote.earliest_us == 0  # not even an idle replica could
    assert answer.verdict.kind == ADMITTED


async def test_a_quote_that_fits_says_how_tight_it_could_be(planner) -> None:
    now_us = planner.clock.now_us()
    ask = planner_pb2.PlanQuoteRequest(replica_id="gpu-0", candidate=a_candidate(now_us, "r1"))
    async with planner.worker(a_state(now_us)):
        quote = await planner.stub.Quote(ask)
    assert quote.fits
    assert quote.verdict.kind == ADMITTED
    assert 0 < quote.tightest_ttft_ms < 1000
    assert quote.tightest_tpot_ms == 50
    assert 0 <= quote.earliest_us - now_us < 5_000_000


async def test_an_application_under_its_floor_counts_ten_times(planner) -> None:
    now_us = planner.clock.now_us()
    ends = [
        planner_pb2.FinishedLength(request_id=f"e{n}", application="coder", output_tokens=5, missed="ttft")
        for n in range(20)
    ]
    async with planner.worker(a_state(now_us, finished=ends)):
        await planner.admit(a_candidate(now_us, "r1", application="coder"), a_candidate(now_us, "r2"))
    assert [candidate.weight for candidate in planner.runs[0].candidates] == [20, 1]
