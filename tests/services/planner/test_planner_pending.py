"""When a plan's answer is a promise and when the request waits for one, and what the worker is told about batches."""

import pytest

from protos import planner_pb2, types_pb2
from services.core.duration_cap import CAP_STEPS
from tests.services.planner.planner_messages import a_candidate, a_request, a_state

ADMITTED, BEST_EFFORT, PENDING = (
    types_pb2.VERDICT_KIND_ADMITTED,
    types_pb2.VERDICT_KIND_BEST_EFFORT,
    types_pb2.VERDICT_KIND_PENDING,
)
EARLY, LATE, FIRM = types_pb2.VERDICT_MODE_EARLY, types_pb2.VERDICT_MODE_LATE, types_pb2.VERDICT_MODE_FIRM


@pytest.mark.parametrize(
    ("mode", "prompt_tokens", "kind"),
    [(EARLY, 1000, ADMITTED), (EARLY, 1001, PENDING), (LATE, 200, PENDING), (FIRM, 3000, ADMITTED)],
)
async def test_what_fits_is_promised_as_its_application_wants(planner, mode, prompt_tokens, kind) -> None:
    now_us = planner.clock.now_us()
    candidate = a_candidate(now_us, "r1", ttft_ms=5000, prompt_tokens=prompt_tokens, verdict_mode=mode)
    async with planner.worker(a_state(now_us)):
        [answer] = await planner.admit(candidate)
    verdict = answer.verdict
    assert (verdict.kind, verdict.replica_id, verdict.tier) == (kind, "gpu-0", "loose")
    assert verdict.predicted_ttft_ms > 0
    assert not verdict.HasField("constraint")
    assert answer.reserved_until_us > 0


@pytest.mark.parametrize(("mode", "kind"), [(EARLY, PENDING), (LATE, PENDING), (FIRM, BEST_EFFORT)])
async def test_what_does_not_fit_now_waits_unless_the_verdict_is_firm(planner, mode, kind) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us, max_num_seqs=1, requests=[a_request(now_us, "busy")])):
        [answer] = await planner.admit(a_candidate(now_us, "r1", verdict_mode=mode))
    assert answer.verdict.kind == kind
    assert answer.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_MAX_SEQS


@pytest.mark.parametrize("mode", [EARLY, LATE])
async def test_what_is_hopeless_never_waits(planner, mode) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        [answer] = await planner.admit(a_candidate(now_us, "r1", ttft_ms=50, prompt_tokens=4000, verdict_mode=mode))
    assert (answer.verdict.kind, answer.reserved_until_us) == (BEST_EFFORT, 0)
    assert answer.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS


@pytest.mark.parametrize(("seats", "kind"), [(2, ADMITTED), (1, PENDING)])
async def test_a_cheap_request_is_promised_at_once_unless_a_pending_one_would_pay_for_it(planner, seats, kind) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us, max_num_seqs=seats)):
        [waits] = await planner.admit(a_candidate(now_us, "long", ttft_ms=5000, prompt_tokens=3000, verdict_mode=EARLY))
        [cheap] = await planner.admit(a_candidate(now_us, "cheap", verdict_mode=EARLY))
        [again] = await planner.admit(a_candidate(now_us, "long", ttft_ms=5000, prompt_tokens=3000, verdict_mode=EARLY))
    assert [answer.verdict.kind for answer in (waits, cheap, again)] == [PENDING, kind, PENDING]
    assert not cheap.verdict.HasField("constraint")  # its plan has room: the engine decides whom it takes
    assert again == waits


async def test_the_engines_decision_on_a_pending_request_is_remembered(planner) -> None:
    now_us = planner.clock.now_us()
    replica = {"ttft_deadline_us": now_us + 5_000_000, "output_tokens": 0, "computed_tokens": 0, "prompt_tokens": 3000}
    async with planner.worker(a_state(now_us)) as stream:
        for name in ("kept", "lost"):
            await planner.admit(a_candidate(now_us, name, ttft_ms=5000, prompt_tokens=3000, verdict_mode=EARLY))
        waiting = [a_request(now_us, name, promised=False, started=False, **replica) for name in ("kept", "lost")]
        await stream.send(a_state(now_us, 2, full=False, requests=waiting))
        ledger = planner.fleet.get("gpu-0").ledger
        await planner.until(lambda: set(ledger.entries) == {"kept", "lost"})
        said = {name: ledger.history.get(name).verdict.kind for name in ("kept", "lost")}
        assert said == {"kept": PENDING, "lost": PENDING}
        assert ledger.reservation(("kept", 1)) is None
        decided = [
            a_request(now_us, "kept", promised=True, **replica),
            a_request(
                now_us, "lost", promised=False, **{**replica, "tier": "best-effort", "ttft_deadline_us": now_us + 1}
            ),
        ]
        await stream.send(a_state(now_us, 3, full=False, requests=decided))
        await planner.until(lambda: ledger.history.get("lost").verdict.kind == BEST_EFFORT)
        assert ledger.history.get("kept").admitted


async def test_the_cap_on_batches_is_streamed_and_follows_how_long_first_tokens_can_wait(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)) as stream:
        first = await stream.next_parameters()
        await planner.admit(a_candidate(now_us, "r1", ttft_ms=150, prompt_tokens=100))
        await stream.send(a_state(now_us, 2, full=False))
        second = await stream.next_parameters()
    assert first.duration_cap_ms == 100
    assert second.duration_cap_ms == 120  # 150 less 28 of its own, in steps of 5
    settings = planner.runs[-1].settings
    assert settings.caps_s == pytest.approx([second.duration_cap_ms / 1000 * step for step in CAP_STEPS])
    assert planner.fleet.get("gpu-0").promises.settings().caps_s == settings.caps_s


async def test_two_batches_in_flight_halve_the_cap_down_to_what_a_batch_costs(planner) -> None:
    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us, batches_in_flight=2)) as stream:
        await stream.next_parameters()
        await planner.admit(a_candidate(now_us, "r1", ttft_ms=300, prompt_tokens=100))
        await stream.send(a_state(now_us, 2, full=False, batches_in_flight=2))
        assert 65 <= (await stream.next_parameters()).duration_cap_ms <= 125  # half of 272 less its way


async def test_a_plan_puts_no_more_into_a_batch_than_the_engine_does(planner) -> None:
    def candidate() -> planner_pb2.Candidate:  # 320 ms in two batches, 600 ms in pieces of 256 tokens
        return a_candidate(planner.clock.now_us(), "r1", ttft_ms=560, prompt_tokens=4000)

    now_us = planner.clock.now_us()
    async with planner.worker(a_state(now_us)):
        [whole] = await planner.admit(candidate())
        await planner.stub.Release(planner_pb2.ReleaseRequest(replica_id="gpu-0", request_id="r1", attempt=1))
    async with planner.worker(a_state(now_us, max_batch_tokens=256)):
        [pieces] = await planner.admit(candidate())
    assert (whole.verdict.kind, pieces.verdict.kind) == (ADMITTED, BEST_EFFORT)
    assert planner.runs[-1].settings.max_batch_tokens == 256


@pytest.mark.parametrize(
    ("prompt_tokens", "ttft_ms", "wanted"),
    [(100, 200, True), (3000, 200, False)],  # the second is hopeless even on an idle replica
)
async def test_a_tight_first_token_behind_a_long_batch_of_best_effort_is_declined_but_wanted(
    planner, prompt_tokens, ttft_ms, wanted
) -> None:
    now_us = planner.clock.now_us()
    best_effort = a_request(now_us, "be", tier="best-effort", promised=False)
    state = a_state(now_us, requests=[best_effort], engine_free_at_us=now_us + 500_000)
    async with planner.worker(state) as stream:
        await stream.next_parameters()
        [declined] = await planner.admit(a_candidate(now_us, "r1", ttft_ms=ttft_ms, prompt_tokens=prompt_tokens))
        assert declined.verdict.kind == BEST_EFFORT
        promises = planner.fleet.get("gpu-0").promises
        assert promises.take_turned_away() is wanted
        assert promises.take_turned_away() is False


async def test_the_worker_is_told_that_a_promise_was_wanted_and_the_next_one_is_given(planner) -> None:
    now_us = planner.clock.now_us()
    best_effort = a_request(now_us, "be", tier="best-effort", promised=False)
    async with planner.worker(a_state(now_us, requests=[best_effort], engine_free_at_us=now_us + 500_000)) as stream:
        assert not (await stream.next_parameters()).promises_wanted
        await planner.admit(a_candidate(now_us, "r1", ttft_ms=200, prompt_tokens=100))
        later_us = planner.clock.now_us()
        await stream.send(a_state(later_us, 2, full=False, engine_free_at_us=later_us + 20_000))
        assert (await stream.next_parameters()).promises_wanted
        [answer] = await planner.admit(a_candidate(planner.clock.now_us(), "r2", ttft_ms=200, prompt_tokens=100))
        assert answer.verdict.kind == ADMITTED
