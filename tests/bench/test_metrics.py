"""Metrics on hand-made token times."""

from dataclasses import replace

import pytest

from bench.metrics import met, met_held, met_paper, met_smooth, outcome_of
from bench.scenario_jobs import Call, Job, Stage
from bench.simulator_call import LiveCall
from services.core.slo import StageKind

ANSWER = Stage(StageKind.ANSWER, 0.1, 5)


def done(times: list[float], *stages: Stage, ttft_s: float = 1.0, number: int = 0, calls: int = 1) -> LiveCall:
    call = Call(100, 0, ttft_s, stages or (replace(ANSWER, tokens=len(times)),))
    return LiveCall(
        f"{number}.0", Job(number, "chatbot", 0.0, (call,) * calls), 0, 0.0, times, promised_s=0.0, finished=True
    )


def test_mean_tpot_forgives_a_stutter_and_smooth_does_not() -> None:
    call = done([0.5, 0.75, 0.8, 0.85, 0.9])
    assert met(call)
    assert not met_smooth(call)


def test_smooth_allows_every_token_at_its_deadline() -> None:
    assert met_smooth(done([1.0, 1.1, 1.2, 1.3]))


@pytest.mark.parametrize("judge", [met, met_held, met_smooth])
def test_a_late_first_token_is_a_miss_without_tolerance(judge: object) -> None:
    assert callable(judge)
    assert not judge(done([1.001, 1.01, 1.02]))


def test_a_slow_decode_is_a_miss_even_if_it_ends_early_enough_for_a_held_first_token() -> None:
    call = done([0.5, 0.9, 1.2])
    assert not met(call)  # 0.35 s per token
    assert met_held(call)  # nothing was released before 1.0 s


def test_every_stage_has_its_own_tpot() -> None:
    think, answer = Stage(StageKind.THINK, 0.05, 3), Stage(StageKind.ANSWER, 0.1, 2)
    assert met(done([0.5, 0.55, 0.6, 0.7, 0.8], think, answer))
    assert not met(done([0.5, 0.57, 0.64, 0.7, 0.75], think, answer))


def test_the_published_metric_tolerates_five_percent_and_checks_every_twentieth_token() -> None:
    steady = [1.04 + 0.104 * n for n in range(41)]
    assert met_paper(done(steady))
    assert not met_paper(done([*steady[:19], steady[19] + 1.0, *(t + 1.0 for t in steady[20:])]))
    stutter = list(steady)
    stutter[9] += 0.09  # token 10 is not looked at
    assert met_paper(done(stutter))


def test_the_published_metric_starts_the_decode_clock_at_the_deadline() -> None:
    assert met_paper(done([0.2, 0.8, 1.1]))


def test_unfinished_refused_and_unsent_calls_are_misses() -> None:
    good, session = done([0.5, 0.6], number=0), done([0.5, 0.6], number=1, calls=2)
    unfinished = done([0.5], number=2)
    unfinished.finished = False
    refused = done([], number=3)
    refused.finished, refused.refused = False, True
    outcome = outcome_of([good, session, unfinished, refused], 5, promises=True)
    assert outcome.attainment == pytest.approx(1 / 5)
    assert outcome.promised == 4
    assert outcome.kept == pytest.approx(2 / 4)


def test_promises_of_a_system_that_holds_first_tokens_are_judged_as_its_clients_see_them() -> None:
    call = done([0.2, 1.0, 1.1])  # 0.9 s for two tokens, unless the first is held until it is due
    assert outcome_of([call], 1, promises=True).kept == 0.0
    held = outcome_of([call], 1, promises=True, holds=True)
    assert (held.kept, [*held.applications.values()]) == (1.0, [1.0])


def test_the_published_metric_counts_only_promised_requests_of_a_system_that_promises() -> None:
    call = done([0.5, 0.6])
    call.promised_s = None
    assert outcome_of([call], 1, promises=True).paper == 0.0
    assert outcome_of([call], 1, promises=False).paper == 1.0
