"""A request's deadlines and stages as the hook follows them."""

import msgspec
import pytest

from services.core.slo import BEST_EFFORT, StageKind
from services.worker.decoder_table import DecoderTable
from services.worker.hook_request import TierNames, TrackedRequest
from services.worker.request_terms import RequestTerms, StageTerms, from_extra_args, to_extra_args

THINK = StageTerms(StageKind.THINK.value, "loose", 0.1, 4, 99)
ANSWER = StageTerms(StageKind.ANSWER.value, "tight", 0.05, 100, None)


def tracked(
    *stages: StageTerms,
    promised: bool = True,
    delivered: tuple[int, ...] = (),
    first_token_s: float | None = None,
    produced: list[int] | None = None,
) -> TrackedRequest:
    terms = RequestTerms(
        "r", 1, "app", promised, 10.0, 9.0, 20, "d", len(delivered), first_token_s, stages or (ANSWER,)
    )  # fmt: skip
    prompt = (5, 6, 7, *delivered)
    return TrackedRequest("r-1", 1, terms, prompt, [] if produced is None else produced, 100)


def test_terms_survive_the_way_into_the_engine() -> None:
    terms = tracked(THINK, ANSWER).terms
    assert from_extra_args(to_extra_args(terms), "other", 1) == terms


def test_a_request_without_terms_is_best_effort() -> None:
    terms = from_extra_args(None, "plain", 7)
    assert (terms.request_id, terms.promised, terms.forecast_tokens) == ("plain", False, 7)


def test_before_the_first_token_the_first_token_is_due() -> None:
    assert tracked().due_s == 10.0


def test_token_n_is_due_n_minus_one_periods_after_the_first() -> None:
    request = tracked()
    request.first_token(9.5)
    request.tokens = 1
    assert request.due_s == 9.5 + 0.05
    request.tokens = 11
    assert abs(request.due_s - (9.5 + 11 * 0.05)) < 1e-12


def test_what_a_last_token_may_take_longer_on_its_way_is_kept_in_hand_and_is_no_miss() -> None:
    produced: list[int] = []
    request = tracked(produced=produced)
    request.terms = msgspec.structs.replace(request.terms, delivery_spread_s=0.004)
    assert request.due_s == 10.0  # a first token's way is off its deadline already
    table = DecoderTable(4)
    table.add(request, 0, 9.5)
    request.first_token(9.5)
    table.refresh(request, 0)
    table.advance(slice(None))
    assert table.due_s.tolist() == [pytest.approx(9.5 + 0.05 - 0.004)]
    table.sync(request)
    assert request.due_s == table.due_s[0]
    produced += [1, 2, 3]
    assert request.met(9.5 + 2 * 0.05)
    assert not request.met(9.5 + 2 * 0.05 + 1e-4)


def test_a_relaxed_request_is_due_when_it_was_said_whatever_is_kept_in_hand() -> None:
    request = tracked()
    request.terms = msgspec.structs.replace(request.terms, delivery_spread_s=0.004)
    request.first_token(9.5)
    request.tokens = 3
    request.relax(12.0, 0.2)
    assert request.due_s == pytest.approx(12.0)


def test_only_the_first_first_token_counts() -> None:
    request = tracked()
    request.first_token(9.5)
    request.first_token(12.0)
    assert request.anchor_s == 9.5


def test_a_stage_ends_with_its_token_and_the_next_counts_from_there() -> None:
    produced: list[int] = []
    request = tracked(THINK, ANSWER, produced=produced)
    request.first_token(9.5)
    produced += [1, 2, 99]
    request.outputs = request.tokens = 3
    assert request.tier_name == "loose"
    assert request.stage_ended(10.0)
    request.enter_stage(9.9)
    assert (request.tier_name, request.tokens) == ("tight", 0)
    assert abs(request.due_s - (9.9 + 0.05)) < 1e-12


def test_a_token_in_flight_when_a_stage_ends_belongs_to_the_next() -> None:
    produced = [1, 2, 99]
    request = tracked(THINK, ANSWER, produced=produced)
    request.first_token(9.5)
    request.outputs = 4
    assert request.stage_ended(10.0)
    request.enter_stage(9.9)
    assert request.tokens == 1
    assert abs(request.due_s - (9.9 + 2 * 0.05)) < 1e-12


def test_a_later_attempt_takes_up_stage_and_deadline() -> None:
    request = tracked(THINK, ANSWER, delivered=(1, 2, 99, 3, 4), first_token_s=9.0)
    last_thought_s = 9.0 + 2 * 0.1
    assert request.tier_name == "tight"
    assert request.tokens == 2
    assert abs(request.due_s - (last_thought_s + 3 * 0.05)) < 1e-12


def test_without_a_promise_every_stage_is_best_effort_until_promoted() -> None:
    request = tracked(StageTerms("ANSWER", BEST_EFFORT, 0.1, 50, None), promised=False)
    assert request.tier_name == BEST_EFFORT
    request.promote("tight")
    assert (request.promised, request.tier_name) == (True, "tight")


def test_an_outlived_forecast_doubles_within_max_tokens() -> None:
    request = tracked()
    request.outputs = 5
    assert request.forecast_left == 15
    request.outputs = 20
    assert request.forecast_left == 20
    request.outputs = 90
    assert request.forecast_left == 10


def test_tier_indices_are_stable_and_best_effort_is_minus_one() -> None:
    names = TierNames()
    assert [names.index(name) for name in ("loose", BEST_EFFORT, "tight", "loose")] == [0, -1, 1, 0]


def test_the_table_counts_what_is_scheduled_and_hands_counts_back() -> None:
    table = DecoderTable(1)
    first, second = tracked(), tracked()
    second.key = "r-2"
    for request in (first, second):
        request.computed_tokens, request.outputs, request.tokens = 3, 1, 1
        table.add(request, 0, 9.5)
    table.advance(table.ints("number") > 0)
    assert table.ints("context").tolist() == [4, 4]
    assert [round(due_s, 9) for due_s in table.due_s.tolist()] == [9.6, 9.6]
    table.remove(first)
    assert (first.computed_tokens, first.outputs, first.tokens) == (4, 2, 2)
    assert table.keys == ["r-2"]
    assert table.columns()[0].context_tokens == 4


def test_an_slo_is_met_by_every_stage_or_not_at_all() -> None:
    produced: list[int] = []
    request = tracked(THINK, ANSWER, produced=produced)
    request.first_token(9.5)
    produced += [1, 2, 99]
    assert request.stage_ended(9.5 + 2 * 0.1)
    request.enter_stage(9.7)
    produced += [3, 4]
    assert request.met(9.7 + 2 * 0.05)
    assert not request.met(9.7 + 2 * 0.05 + 0.001)


def test_a_stage_that_was_late_is_not_made_good_by_the_next() -> None:
    produced: list[int] = []
    request = tracked(THINK, ANSWER, produced=produced)
    request.first_token(9.5)
    produced += [1, 2, 99]
    assert request.stage_ended(9.5 + 2 * 0.1 + 0.001)
    request.enter_stage(9.7)
    assert not request.met(9.7)


def test_a_late_first_token_is_a_miss_also_of_an_earlier_attempt() -> None:
    request = tracked()
    request.first_token(10.5)
    assert not request.met(10.5)
    assert not tracked(THINK, ANSWER, delivered=(1, 2), first_token_s=10.5, produced=[3]).met(10.6)
    assert tracked(THINK, ANSWER, delivered=(1, 2), first_token_s=9.5, produced=[3]).met(9.7)
    assert not tracked(THINK, ANSWER, delivered=(1, 2), first_token_s=9.5, produced=[3]).met(9.8)


def test_nothing_is_met_before_there_is_a_token() -> None:
    assert not tracked().met(9.0)


def test_a_waiting_request_is_planned_with_its_latest_forecast() -> None:
    request = tracked()
    assert request.planned(1, lambda _: 0).output_tokens == 20
    request.reforecast(60)
    assert request.planned(1, lambda _: 0).output_tokens == 60
