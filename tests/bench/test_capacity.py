"""The search for a capacity, the names of systems, and the page of results."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.capacity import Row
from bench.capacity_book import ResultBook, summary
from bench.capacity_search import Capacity, Laboratory, Point, find_capacity
from bench.metrics import Outcome
from bench.report import collect
from bench.report_files import write_result
from bench.scenario import ScenarioRule
from bench.scenario_jobs import Workload
from bench.simulator_engine import Engines
from bench.systems import System, UnknownSystemError, parse_systems
from services.core.admission import Policy
from services.core.presets import preset

PRESET = preset("opt-6.7b-a100")
WORKLOAD = Workload("test", 0, 1, ScenarioRule(arrivals="none", windows=((0, 1),)), (), 4.0)


def outcome(attainment: float) -> Outcome:
    return Outcome(100, attainment, attainment, attainment, attainment, attainment, {}, 0, 1.0, 0.1, 0.2)


class FallingLaboratory(Laboratory):
    """Attainment falls as 1 / load beyond a knee."""

    def run(self, system: System, workload: Workload, rate: float, *, whole: bool = False) -> Point:
        return Point(rate, outcome(min(1.0, 9.0 / rate)), "", 1, 0.0)


@pytest.mark.parametrize("guess", [None, 1.0, 10.0, 80.0])
def test_bisection_ends_within_three_percent_below_the_crossing(guess: float | None) -> None:
    laboratory = FallingLaboratory(Engines(), PRESET, (), 7000)
    found = find_capacity(laboratory, parse_systems("vllm-512")[0], WORKLOAD, lambda o: o.attainment, guess)
    assert 10.0 / 1.03 <= found.rate <= 10.0
    assert found.at is not None
    assert len(found.points) < 25


def test_a_run_that_was_cut_is_not_carried() -> None:
    assert not Point(1.0, outcome(1.0), "missed", 1, 0.0).carried(lambda o: o.attainment)


def test_a_family_is_all_its_members() -> None:
    systems = parse_systems("vllm,sarathi,slos-mh+known")
    assert [system.name for system in systems] == ["vllm-512", "vllm-2048", "vllm-8192", "sarathi", "slos-mh+known"]
    assert [system.family for system in systems] == ["vllm", "vllm", "vllm", "sarathi", "slos-mh+known"]
    assert systems[-1].policy is Policy.MH


@pytest.mark.parametrize("name", ["vlm", "slos-mh+fast", "slos-best", "vllm-priority-x"])
def test_unknown_systems_and_options_are_refused(name: str) -> None:
    with pytest.raises(UnknownSystemError, match="there are"):
        parse_systems(name)


def row(scenario: str, system: str, family: str, rate: float, window: int = 0) -> Row:
    return Row(scenario, window, 1, system, family, Capacity(rate, (Point(rate, outcome(0.92), "", 1, 0.0),)))


def test_the_summary_takes_the_best_member_in_every_window_and_the_geometric_mean_of_ratios() -> None:
    rows = [
        row("chatbot", "vllm-512", "vllm", 2.0),
        row("chatbot", "vllm-8192", "vllm", 4.0),
        row("chatbot", "slos-mh", "slos-mh", 8.0),
        row("coder", "vllm-512", "vllm", 1.0),
        row("coder", "slos-mh", "slos-mh", 8.0),
    ]
    text = summary([entry.as_json() for entry in rows])
    assert "| chatbot | 4.00 | 8.00 | 2.00 |" in text
    assert "| coder | 1.00 | 8.00 | 8.00 |" in text
    assert "| geometric mean |  |  | 4.00 |" in text


def test_ratios_are_over_the_windows_that_both_were_measured_in() -> None:
    rows = [
        row("chatbot", "vllm-512", "vllm", 4.0, window=0),
        row("chatbot", "vllm-512", "vllm", 2.0, window=1),
        row("chatbot", "slos-mh", "slos-mh", 8.0, window=0),
    ]
    assert "| chatbot | 3.00 | 8.00 | 2.00 |" in summary([entry.as_json() for entry in rows])


def test_a_comparison_can_be_made_in_parts(tmp_path: Path) -> None:
    settings = {"metric": "met", "kv_blocks": 7000}
    for entry in (row("chatbot", "vllm-512", "vllm", 4.0), row("chatbot", "slos-mh", "slos-mh", 6.0)):
        ResultBook(tmp_path, "c", settings, PRESET).add(entry.as_json())
    ResultBook(tmp_path, "c", settings, PRESET).add(row("chatbot", "slos-mh", "slos-mh", 8.0).as_json())
    assert "| chatbot | 4.00 | 8.00 | 2.00 |" in (tmp_path / "c.md").read_text()


def test_two_processes_may_measure_side_by_side(tmp_path: Path) -> None:
    ours, theirs = (ResultBook(tmp_path, "c", {"kv_blocks": 7000}, PRESET) for _ in range(2))
    theirs.add(row("chatbot", "vllm-512", "vllm", 4.0).as_json())
    ours.add(row("chatbot", "slos-mh", "slos-mh", 8.0).as_json())
    theirs.add(row("mixed", "vllm-512", "vllm", 1.0).as_json())
    assert "| chatbot | 4.00 | 8.00 | 2.00 |" in (tmp_path / "c.md").read_text()
    assert "| mixed | 1.00 |" in (tmp_path / "c.md").read_text()


def test_rows_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    ResultBook(tmp_path, "c", {"kv_blocks": 7000}, PRESET).add(row("chatbot", "vllm-512", "vllm", 4.0).as_json())
    other = ResultBook(tmp_path, "c", {"kv_blocks": 9000}, PRESET)
    other.add(row("chatbot", "slos-mh", "slos-mh", 8.0).as_json())
    assert "vllm" not in other.text


def test_the_page_shows_capacities_beside_their_bounds(tmp_path: Path) -> None:
    common: dict[str, Any] = {"preset": {"name": PRESET.name}}
    settings = {"metric": "met", "kv_blocks": 7000, "replicas": 1}
    rows = [row("chatbot", "slos-mh", "slos-mh", 6.0).as_json()]
    write_result(tmp_path, "capacity-x", {"kind": "capacity", "settings": settings, "rows": rows, **common}, "| a |\n")
    bound = [{"scenario": "chatbot", "window": 0, "seed": 1, "bound": 8.0, "points": []}]
    write_result(
        tmp_path, "bound-x", {"kind": "bound", "settings": {"kv_blocks": 7000}, "rows": bound, **common}, "| b |\n"
    )
    page = collect(tmp_path, tmp_path)
    assert "| chatbot, slos-mh | 0.75 | 0.75 | 1 |" in page
    assert "| chatbot w0 seed 1 | 6.00 |" in page
    assert "[capacity-x.json](capacity-x.json)" in page
    assert json.loads((tmp_path / "capacity-x.json").read_text())["rows"][0]["capacity"] == 6.0
