"""How sure a scaling factor is."""

import math

import pytest

from bench.scale import ratio_interval, widened
from bench.scenario import SCENARIOS, load_scenarios
from bench.scenario_jobs import build_workload
from services.core.presets import preset


def test_the_interval_of_equal_ratios_has_no_width() -> None:
    assert ratio_interval([4.1, 4.1, 4.1]) == pytest.approx((4.1, 0.0))


def test_the_interval_follows_students_distribution() -> None:
    mean, half = ratio_interval([3.8, 4.0, 4.2])
    assert mean == pytest.approx(4.0)
    assert half == pytest.approx(4.30 * 0.2 / math.sqrt(3))


def test_one_run_says_nothing_about_its_spread() -> None:
    mean, half = ratio_interval([4.2])
    assert mean == 4.2
    assert math.isnan(half)


def test_a_larger_fleet_gets_more_of_the_same_traffic() -> None:
    file, model = load_scenarios(SCENARIOS), preset("opt-6.7b-a100").model
    wide = widened(file, "chatbot", 3)
    one, three = (build_workload(which, "chatbot", model, index=1).jobs for which in (file, wide))
    assert len(three) == 3 * len(one)
    assert [job.calls for job in three[: len(one)]] == [job.calls for job in one]
    assert wide.scenario("coder") == file.scenario("coder")
