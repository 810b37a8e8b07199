"""Scenario files and the workloads made of them."""

from itertools import pairwise
from pathlib import Path

import pytest

from bench.scenario import ScenarioError, ScenarioFile, load_scenarios
from bench.scenario_jobs import Workload, at_rate, build_workload
from bench.workload import WorkloadError
from services.core.perf_model import BatchShape
from services.core.presets import preset
from services.core.slo import StageKind

MODEL = preset("opt-6.7b-a100").model
PEER = Path(__file__).parents[2] / "bench" / "scenarios" / "peer.yaml"


@pytest.fixture(scope="module")
def file() -> ScenarioFile:
    return load_scenarios()


def test_a_slowdown_is_a_multiple_of_the_idle_prefill_and_has_a_floor(file: ScenarioFile) -> None:
    for job in build_workload(file, "chatbot", MODEL).jobs:
        call = job.calls[0]
        assert call.ttft_s == pytest.approx(max(0.1, 5 * MODEL.seconds(BatchShape(call.prompt_tokens))))


def test_load_changes_arrivals_and_nothing_else(file: ScenarioFile) -> None:
    workload = build_workload(file, "chatbot", MODEL)
    doubled = at_rate(workload, 2 * workload.rate)
    assert [job.calls for job in doubled] == [job.calls for job in workload.jobs]
    assert doubled[-1].arrival_s == pytest.approx(workload.jobs[-1].arrival_s / 2)
    assert (len(doubled) - 1) / doubled[-1].arrival_s == pytest.approx(2 * workload.rate)


def test_the_mixed_scenario_replaces_a_tenth_by_long_applications(file: ScenarioFile) -> None:
    jobs = build_workload(file, "mixed", MODEL).jobs
    counts = {name: sum(job.application == name for job in jobs) for name in file.applications}
    assert counts["chatbot"] > 0 < counts["coder"]
    assert 30 < counts["summarizer"] + counts["reasoner"] < 90


def test_a_reasoner_thinks_and_answers_at_two_speeds(file: ScenarioFile) -> None:
    stages = build_workload(file, "reasoner", MODEL).jobs[0].calls[0].stages
    assert [(stage.kind, stage.tpot_s) for stage in stages] == [(StageKind.THINK, 0.05), (StageKind.ANSWER, 0.1)]


def test_a_session_grows_by_its_own_history_and_ends_with_a_loose_answer(file: ScenarioFile) -> None:
    for job in build_workload(file, "tool-agent", MODEL).jobs[:20]:
        for before, after in pairwise(job.calls):
            assert after.cached_tokens == before.prompt_tokens + before.output_tokens
            assert after.prompt_tokens > after.cached_tokens
        assert job.calls[-1].stages[0].tpot_s == 0.1
        assert all(call.stages[0].tpot_s == 0.05 for call in job.calls[:-1])
        assert job.calls[0].gap_s == 0.0


def test_the_same_seed_gives_the_same_workload(file: ScenarioFile) -> None:
    assert build_workload(file, "mixed", MODEL, seed=3) == build_workload(file, "mixed", MODEL, seed=3)
    assert build_workload(file, "summarizer", MODEL, seed=3) != build_workload(file, "summarizer", MODEL, seed=4)


def test_the_peer_file_leaves_long_requests_out() -> None:
    peer = load_scenarios(PEER)
    for name in peer.scenarios:
        jobs = build_workload(peer, name, MODEL).jobs
        assert max(job.calls[0].prompt_tokens + job.calls[0].output_tokens for job in jobs) <= 2038
    assert len(build_workload(peer, "peer-code", MODEL).jobs) == 558


def test_poisson_arrivals_keep_the_rate_and_lose_the_bursts() -> None:
    peer = load_scenarios(PEER)
    trace, poisson = (build_workload(peer, name, MODEL) for name in ("peer-code", "peer-code-poisson"))
    assert poisson.rate == pytest.approx(trace.rate, rel=0.15)

    def busiest(workload: Workload) -> int:
        seconds = [int(job.arrival_s) for job in workload.jobs]
        return max(seconds.count(second) for second in set(seconds))

    assert busiest(poisson) < busiest(trace) / 2


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("tiers: {}\napplications: {}\nscenarios: {}\n", "tiers"),
        ("nonsense: 1\n", "nonsense"),
        ("{", "not valid YAML"),
        (
            "tiers: {tight: 50}\n"
            "applications: {a: {ttft_slowdown: 5, stages: [{kind: ANSWER, tpot_ms: 20}]}}\n"
            "scenarios: {s: {arrivals: x, windows: [[0, 1]]}}\n",
            "tighter than every tier",
        ),
        (
            "tiers: {tight: 50}\n"
            "applications: {a: {ttft_slowdown: 5, stages: [{kind: ANSWER, tpot_ms: 50}]}}\n"
            "scenarios: {s: {arrivals: x, windows: [[0, 1]], application: b}}\n",
            "unknown application 'b'",
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "scenarios.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ScenarioError, match=where):
        load_scenarios(path)


def test_unknown_names_and_windows_are_refused(file: ScenarioFile) -> None:
    with pytest.raises(ScenarioError, match="no scenario 'nope'"):
        build_workload(file, "nope", MODEL)
    with pytest.raises(WorkloadError, match="no window 9"):
        build_workload(file, "chatbot", MODEL, index=9)


def test_the_scenario_file_of_the_evaluation_builds_every_workload(file: ScenarioFile) -> None:
    for name, rule in file.scenarios.items():
        built = build_workload(file, name, MODEL)
        assert 2 <= len(built.jobs) <= rule.most_requests
        assert built.jobs[0].arrival_s == 0.0
        assert all(call.ttft_s >= 0.1 and call.output_tokens >= 1 for job in built.jobs for call in job.calls)
