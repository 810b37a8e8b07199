"""The formulas of promised against delivered."""

import pytest

from services.admission.stage_clock import StageClock
from services.core.slo import StageKind, StageSlo
from services.core.stages import StageEnd

THINK = StageSlo(StageKind.THINK, 0.2, None, 0.05, 100)
ANSWER = StageSlo(StageKind.ANSWER, None, None, 0.1, 100)
T0 = 1_000_000_000


def sent(clock: StageClock, *times_ms: float, start: int = 0) -> None:
    for number, ms in enumerate(times_ms, start=start + 1):
        clock.tokens_sent(number, T0 + round(ms * 1000))


def test_the_first_stage_counts_from_its_first_token() -> None:
    clock = StageClock((THINK,), T0)
    sent(clock, 150, 190, 230)
    report = clock.report(0)
    assert (report.ttft_ms, report.tpot_ms, report.output_tokens, report.met) == (150, 40, 3, True)


def test_a_later_stage_counts_from_the_last_token_before_it() -> None:
    clock = StageClock((THINK, ANSWER), T0)
    clock.stage_ends(StageEnd(0, StageKind.THINK, 2))
    sent(clock, 100, 140, 240, 340)
    think, answer = clock.reports()
    assert (think.output_tokens, think.tpot_ms) == (2, 40)
    assert (answer.output_tokens, answer.ttft_ms, answer.tpot_ms, answer.met) == (2, 0, 100, True)


def test_one_message_may_span_stages() -> None:
    clock = StageClock((THINK, ANSWER), T0)
    clock.stage_ends(StageEnd(0, StageKind.THINK, 2))
    clock.tokens_sent(5, T0 + 100_000)
    assert [report.output_tokens for report in clock.reports()] == [2, 3]


def test_a_replay_changes_nothing() -> None:
    clock = StageClock((THINK,), T0)
    sent(clock, 100, 150)
    before = clock.report(0)
    clock.tokens_sent(1, T0 + 900_000)
    clock.tokens_sent(2, T0 + 950_000)
    assert clock.report(0) == before
    assert clock.delivered == 2


@pytest.mark.parametrize(
    ("times_ms", "met"),
    [((200, 250, 300), True), ((201, 210, 220), False), ((100, 151), False), ((200,), True), ((), False)],
)
def test_met_needs_both_ttft_and_tpot(times_ms: tuple[float, ...], met: bool) -> None:
    clock = StageClock((THINK,), T0)
    sent(clock, *times_ms)
    assert clock.report(0).met is met


def test_stages_that_never_began_are_not_reported() -> None:
    clock = StageClock((THINK, ANSWER), T0)
    sent(clock, 100)
    assert len(clock.reports()) == 1
