"""Promised decoders that are far ahead give their memory to others for a while, and no token is late for it."""

from typing import Any

import pytest

from services.core.slo import StageKind, VerdictMode
from services.worker.request_terms import StageTerms
from tests.services.worker.driven_scheduler import DrivenScheduler, Sent, driven
from tests.services.worker.hook_books import check_books
from tests.services.worker.test_hook_scheduling import DEPTHS, expected_tokens

OUTPUT = 1600
TPOT_S = 0.2
MEMORY: dict[str, Any] = {
    "preset": "opt-6.7b-a100",
    "kv_blocks": 260,
    "max_model_len": 2048,
}  # two and a half at a time


def long_answer(replica: DrivenScheduler, name: str, pending: VerdictMode | None = None) -> Sent:
    return replica.send(name, 64, OUTPUT, ttft_s=0.5, tpot_s=TPOT_S, pending=pending)


def late_tokens(sent: Sent) -> list[int]:
    first_s = sent.times_s[0]
    return [n for n, time_s in enumerate(sent.times_s) if time_s > first_s + n * TPOT_S + 1e-9]


def two_far_ahead(replica: DrivenScheduler) -> list[Sent]:
    sent = [long_answer(replica, f"old{index}") for index in range(2)]
    while len(sent[-1].tokens) < 500:
        replica.step()
    return sent


@DEPTHS
def test_newcomers_get_the_memory_of_those_far_ahead(depth: int) -> None:
    with driven(depth=depth, **MEMORY) as replica:
        total = replica.free_blocks
        sent = two_far_ahead(replica)
        sent += [long_answer(replica, f"new{index}", VerdictMode.EARLY) for index in range(2)]
        replica.run()
        assert all(decided.admitted for decided in replica.decided(2).values())
        assert sum(one.request.num_preemptions for one in sent) >= 2
        assert [late_tokens(one) for one in sent] == [[], [], [], []]
        assert all(one.tokens == expected_tokens(one) for one in sent)
        assert replica.free_blocks == total
        assert not replica.scheduler._hook.pauses


def test_without_pausing_they_are_turned_away() -> None:
    with driven(pausing=False, **MEMORY) as replica:
        sent = two_far_ahead(replica)
        for index in range(2):
            long_answer(replica, f"new{index}", VerdictMode.EARLY)
        replica.run()
        assert not any(decided.admitted for decided in replica.decided(2).values())
        assert all(one.request.num_preemptions == 0 and not late_tokens(one) for one in sent)


@DEPTHS
def test_no_best_effort_starts_while_a_promise_is_paused(depth: int) -> None:
    with driven(depth=depth, **MEMORY) as replica:
        sent = two_far_ahead(replica)
        sent += [long_answer(replica, f"new{index}", VerdictMode.EARLY) for index in range(2)]
        pauses = replica.scheduler._hook.pauses
        while not pauses:
            replica.step()
        replica.send("be", 16, 4, promised=False)
        while pauses:
            assert "be" not in replica.step().num_scheduled_tokens or not pauses
        replica.run()
        assert len(replica.sent["be"].tokens) == 4
        assert [late_tokens(one) for one in sent] == [[], [], [], []]


@DEPTHS
def test_a_paused_request_that_is_aborted_leaves_nothing_behind(depth: int) -> None:
    with driven(depth=depth, **MEMORY) as replica:
        total = replica.free_blocks
        two_far_ahead(replica)
        for index in range(2):
            long_answer(replica, f"new{index}", VerdictMode.EARLY)
        hook = replica.scheduler._hook
        while not hook.pauses:
            replica.step()
        paused = [name for name in replica.sent if name in hook.pauses]
        for name in paused:
            replica.abort(name)
        assert not hook.pauses
        replica.run()
        assert replica.free_blocks == total
        others = [one for name, one in replica.sent.items() if name not in paused]
        assert all(len(one.tokens) == OUTPUT and not late_tokens(one) for one in others)


def test_short_answers_are_never_paused() -> None:
    with driven(**MEMORY) as replica:
        sent = [replica.send(f"s{index}", 800, 300, ttft_s=1.0, tpot_s=TPOT_S) for index in range(3)]
        while len(sent[-1].tokens) < 150:
            replica.step()
        for index in range(3):
            replica.send(f"n{index}", 800, 300, ttft_s=1.0, tpot_s=TPOT_S, pending=VerdictMode.EARLY)
        replica.run()
        assert all(one.request.num_preemptions == 0 for one in sent)


@DEPTHS
def test_a_stage_that_ends_with_its_last_token_in_flight_ends_for_a_paused_request(depth: int) -> None:
    """The token comes back after the pause began: the next stage's deadlines count from then, not from its end."""
    stages = (
        StageTerms(StageKind.THINK.value, "loose", TPOT_S, 600, None),
        StageTerms(StageKind.ANSWER.value, "loose", TPOT_S, OUTPUT - 600, None),
    )
    with driven(depth=depth, **MEMORY) as replica:
        sent = replica.send("staged", 64, OUTPUT, ttft_s=0.5, stages=stages)
        while sent.request.num_output_tokens < 600 - (0 if depth == 1 else depth):
            replica.step()
        scheduler = replica.scheduler
        scheduler.running.remove(sent.request)
        scheduler._preempt_request(sent.request, 0.0)
        tracked = scheduler._tracked["staged"]
        scheduler._hook.paused(tracked)
        replica.drain()
        assert len(sent.tokens) == 600
        assert tracked.tracker.stage_index == 1
        assert tracked.due_s == pytest.approx(sent.times_s[-1] + TPOT_S)
        check_books(replica)
        replica.run()
        assert sent.tokens == expected_tokens(sent)
        assert scheduler._hook.outcomes.attainment("app") == 1.0
