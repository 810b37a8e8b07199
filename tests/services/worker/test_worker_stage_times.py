import pytest

from services.core.slo import StageKind, StageSlo
from services.worker.stage_times import StageTimes

THINK = StageSlo(StageKind.THINK, 1.0, None, 0.05, 100, end_token_id=77)
ANSWER = StageSlo(StageKind.ANSWER, None, None, 0.1, 100)


def test_the_first_stage_is_timed_from_its_first_token() -> None:
    times = StageTimes([ANSWER], [], None)
    for number in range(5):
        times.advance([number], 10.0 + 0.1 * number)
    last = times.finish()
    assert last is not None
    assert (last.begun_s, last.ended_s, last.tokens, last.intervals) == (10.0, 10.4, 5, 4)
    assert last.tpot_s == pytest.approx(0.1)
    assert times.missed(ttft_deadline_s=10.0) == ""


def test_a_later_stage_is_timed_from_the_last_token_before_it() -> None:
    times = StageTimes([THINK, ANSWER], [], None)
    times.advance([1], 10.0)
    (think,) = times.advance([77], 10.04)
    times.advance([5], 10.14)
    times.advance([6], 10.24)
    answer = times.finish()
    assert answer is not None
    assert (think.kind, think.tokens, think.intervals) == (StageKind.THINK, 2, 1)
    assert (answer.kind, answer.begun_s, answer.tokens, answer.intervals) == (StageKind.ANSWER, 10.04, 2, 2)
    assert answer.tpot_s == pytest.approx(0.1)


def test_a_boundary_inside_one_step_ends_the_stage_at_that_step() -> None:
    times = StageTimes([THINK, ANSWER], [], None)
    (think,) = times.advance([1, 77, 5], 10.0)
    assert (think.tokens, think.ended_s) == (2, 10.0)
    assert times.output_tokens == 3


def test_a_continued_first_stage_counts_from_the_first_token_of_the_earlier_attempt() -> None:
    times = StageTimes([ANSWER], [1, 2, 3], 10.0)
    times.advance([4], 10.9)
    last = times.finish()
    assert last is not None
    assert (last.tokens, last.intervals) == (4, 3)
    assert last.tpot_s == pytest.approx(0.3)


def test_a_continued_later_stage_counts_only_what_was_seen_here() -> None:
    times = StageTimes([THINK, ANSWER], [1, 77, 5, 6], 10.0)
    times.advance([7], 20.0)
    times.advance([8], 20.1)
    last = times.finish()
    assert last is not None
    assert (last.kind, last.tokens, last.intervals, last.begun_s) == (StageKind.ANSWER, 4, 1, 20.0)


def test_misses_are_named() -> None:
    late = StageTimes([ANSWER], [], None)
    late.advance([1], 10.5)
    assert late.missed(ttft_deadline_s=10.4) == "ttft"
    assert StageTimes([ANSWER], [], None).missed(ttft_deadline_s=10.0) == "ttft"
    slow = StageTimes([THINK], [], None)
    slow.advance([1], 10.0)
    slow.advance([2], 10.06)
    slow.finish()
    assert slow.missed(ttft_deadline_s=10.0) == "tpot"


def test_a_stage_without_a_token_has_no_time() -> None:
    times = StageTimes([THINK, ANSWER], [], None)
    assert times.finish() is None
    times.advance([77], 10.0)
    assert times.finish() is None
