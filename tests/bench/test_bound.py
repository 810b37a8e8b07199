"""The hindsight bound on instances whose answer is known."""

import math

import pytest

from bench.bound import find_bound
from bench.bound_program import BoundShape, served_share
from bench.scenario_jobs import Call, Job, Stage
from bench.workload import WorkloadError
from services.core.perf_model import PerfModel, Segment
from services.core.slo import StageKind

MODEL = PerfModel((Segment(1e-4, b=2e-2),))


def job(number: int, at_s: float, prompt: int, output: int, ttft_s: float, tpot_s: float = 0.1) -> Job:
    return Job(number, "chatbot", at_s, (Call(prompt, 0, ttft_s, (Stage(StageKind.ANSWER, tpot_s, output),)),))


def test_an_easy_load_is_served_whole() -> None:
    jobs = [job(n, float(n), 500, 20, 1.0) for n in range(10)]
    assert served_share(jobs, MODEL, math.inf) == pytest.approx(1.0)


def test_prompts_beyond_what_time_holds_are_served_in_part() -> None:
    jobs = [job(n, 0.0, 5000, 1, 1.0) for n in range(4)]  # 10_000 tokens/s at best, 20_000 wanted within one second
    assert served_share(jobs, MODEL, math.inf, BoundShape(interval_s=0.25)) == pytest.approx(0.5, abs=0.01)


def test_memory_limits_what_decodes_together() -> None:
    jobs = [job(n, 0.0, 1000, 100, 1.0) for n in range(10)]
    unlimited = served_share(jobs, MODEL, math.inf)
    limited = served_share(jobs, MODEL, 5500.0)
    assert unlimited == pytest.approx(1.0)
    assert 0.45 < limited < 0.65


def test_tight_decoders_cost_batches() -> None:
    """At a period of 25 ms a batch is nearly all fixed cost: what 20 decoders leave of it is 30 tokens of prefill."""

    def share(tpot_s: float) -> float:
        tight = [job(n, 0.0, 10, 400, 0.5, tpot_s) for n in range(20)]
        prompts = [job(20 + n, 0.5 * n, 2500, 1, 0.5) for n in range(1, 15)]
        return served_share([*tight, *prompts], MODEL, math.inf)

    assert share(0.1) > share(0.025) + 0.2


def test_a_longer_ttft_never_serves_less() -> None:
    def share(ttft_s: float) -> float:
        return served_share([job(n, 0.1 * n, 3000, 10, ttft_s) for n in range(12)], MODEL, math.inf)

    assert share(0.5) <= share(1.0) + 1e-9 <= share(3.0) + 2e-9


def test_sessions_are_refused() -> None:
    call = job(0, 0.0, 100, 5, 1.0).calls[0]
    with pytest.raises(WorkloadError, match="sessions"):
        served_share([Job(0, "tool-agent", 0.0, (call, call))], MODEL, math.inf)


def test_the_crossing_is_found_from_either_side() -> None:
    for guess in (1.0, 4.0, 30.0):
        rate, points = find_bound(lambda load: min(1.0, 9.0 / load), guess)
        assert rate == pytest.approx(10.0, rel=0.01)
        assert len(points) <= 12
