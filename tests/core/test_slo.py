"""Tiers, TTFT resolution and token deadlines."""

import pytest

from services.core.errors import BadSloError, SloTooTightError
from services.core.presets import preset
from services.core.slo import StageKind, StageSlo, Tier, resolve_ttft_s, tier_for, token_deadline_s

TIERS = (Tier("loose", 0.1), Tier("tight", 0.05))
MODEL = preset("opt-6.7b-a100").model


def stage(ttft_s: float | None = None, slowdown: float | None = None) -> StageSlo:
    return StageSlo(StageKind.ANSWER, ttft_s, slowdown, 0.1, 100)


@pytest.mark.parametrize(("tpot_s", "index"), [(0.05, 1), (0.099, 1), (0.1, 0), (5.0, 0)])
def test_a_stage_belongs_to_the_loosest_tier_that_meets_it(tpot_s: float, index: int) -> None:
    assert tier_for(tpot_s, TIERS) == index


def test_a_tpot_tighter_than_every_tier_is_an_error_that_says_so() -> None:
    with pytest.raises(SloTooTightError, match="49 ms is tighter than the tightest tier, 50 ms"):
        tier_for(0.049, TIERS)


def test_slowdown_scales_the_zero_load_prefill_but_not_below_the_floor() -> None:
    assert resolve_ttft_s(stage(slowdown=5), 1000, MODEL) == pytest.approx(5 * MODEL.zero_load_prefill_s(1000))
    assert resolve_ttft_s(stage(slowdown=1), 10, MODEL, floor_s=0.1) == 0.1


def test_an_absolute_ttft_is_taken_as_it_is_and_none_promises_nothing() -> None:
    assert resolve_ttft_s(stage(ttft_s=0.02), 1000, MODEL, floor_s=0.1) == 0.02
    assert resolve_ttft_s(stage(), 1000, MODEL) is None


def test_tokens_are_due_one_tpot_apart_from_the_first() -> None:
    assert token_deadline_s(3.0, 1, 0.05) == 3.0
    assert token_deadline_s(3.0, 11, 0.05) == pytest.approx(3.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"ttft_s": 1.0, "ttft_slowdown": 3.0},
        {"ttft_s": -1.0},
        {"ttft_slowdown": float("nan")},
        {"tpot_s": 0.0},
        {"tpot_s": float("inf")},
        {"max_tokens": 0},
    ],
)
def test_contradictory_stages_are_refused(fields: dict[str, float]) -> None:
    valid = {"ttft_s": None, "ttft_slowdown": None, "tpot_s": 0.1, "max_tokens": 10}
    with pytest.raises(BadSloError):
        StageSlo(StageKind.ANSWER, **(valid | fields))
    with pytest.raises(BadSloError):
        Tier("broken", float("nan"))
