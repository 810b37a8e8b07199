"""The simulator: vLLM's real scheduler in virtual time, its own and ours."""

import pytest

from bench.metrics import Outcome, met, outcome_of
from bench.scenario import ScenarioRule
from bench.scenario_jobs import Call, Job, Stage, Workload
from bench.simulator import Clock, Run, Simulation
from bench.simulator_engine import Engines
from bench.systems import build_front, parse_systems
from services.core.perf_model import BatchShape
from services.core.presets import preset
from services.core.slo import StageKind, Tier

PRESET = preset("opt-6.7b-a100")
TIERS = (Tier("tight", 0.05), Tier("loose", 0.1))


@pytest.fixture(scope="module")
def engines() -> Engines:
    return Engines()


def job(
    number: int, at_s: float, prompt: int = 400, output: int = 20, *, ttft_s: float = 0.5, tpot_s: float = 0.1
) -> Job:
    return Job(number, "chatbot", at_s, (Call(prompt, 0, ttft_s, (Stage(StageKind.ANSWER, tpot_s, output),)),))


def workload(jobs: list[Job], *, prefix_caching: bool = False) -> Workload:
    rule = ScenarioRule(arrivals="none", windows=((0, 1),), prefix_caching=prefix_caching)
    return Workload("test", 0, 1, rule, tuple(jobs), 1.0)


def simulate(engines: Engines, system: str, jobs: list[Job], *, kv_blocks: int | None = None, **options: int) -> Run:
    clock = Clock()
    caching = options.pop("prefix_caching", 0)
    front = build_front(
        parse_systems(system)[0],
        engines,
        PRESET,
        TIERS,
        workload(jobs, prefix_caching=bool(caching)),
        clock,
        kv_blocks=kv_blocks,
        **options,
    )
    return Simulation(clock, front, jobs).run()


def judged(run: Run, promises: bool = True) -> Outcome:
    return outcome_of(run.calls, run.jobs, promises=promises)


@pytest.mark.parametrize("system", ["vllm-2048", "slos-mh+known"])
def test_a_lone_request_takes_exactly_the_modelled_time(engines: Engines, system: str) -> None:
    run = simulate(engines, system, [job(0, 3.0, prompt=500, output=5)])
    (call,) = run.calls
    first_s = 3.0 + PRESET.model.seconds(BatchShape(500))
    step_s = PRESET.model.seconds(BatchShape(1))
    assert call.token_s == pytest.approx([first_s + n * step_s for n in range(5)])


@pytest.mark.parametrize("system", ["vllm-512", "vllm-priority-512", "sarathi", "slos-greedy", "slos-mh", "slos-dp"])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_request_gets_all_its_tokens(engines: Engines, system: str, depth: int) -> None:
    jobs = [job(n, 0.05 * n, prompt=100 + 97 * (n % 7), output=3 + n % 11) for n in range(60)]
    run = simulate(engines, system, jobs, depth=depth)
    assert [len(call.token_s) for call in run.calls] == [job.calls[0].output_tokens for job in jobs]
    assert all(call.token_s == sorted(call.token_s) for call in run.calls)


def test_a_small_budget_delays_a_long_prompt(engines: Engines) -> None:
    wide, narrow = (simulate(engines, f"vllm-{budget}", [job(0, 0.0, prompt=4000)]) for budget in (8192, 512))
    assert wide.calls[0].token_s[0] == pytest.approx(PRESET.model.seconds(BatchShape(4000)))
    assert narrow.calls[0].token_s[0] == pytest.approx(
        7 * PRESET.model.seconds(BatchShape(512)) + PRESET.model.seconds(BatchShape(4000 - 7 * 512))
    )


def test_vllm_misses_a_burst_that_ours_sorts_by_deadline(engines: Engines) -> None:
    long = [job(n, 0.0, prompt=4000, ttft_s=10.0) for n in range(6)]
    short = [job(6 + n, 0.01, prompt=200, ttft_s=0.5) for n in range(4)]
    theirs = judged(simulate(engines, "vllm-2048", long + short), promises=False)
    ours = judged(simulate(engines, "slos-mh+known", long + short))
    assert theirs.attainment <= 0.6
    assert ours.attainment == 1.0


def test_promises_are_kept_under_twice_the_load_that_fits(engines: Engines) -> None:
    jobs = [job(n, 0.06 * n, prompt=900, output=100 + n % 50, ttft_s=0.4) for n in range(150)]
    run = simulate(engines, "slos-mh+known", jobs, kv_blocks=3000)
    outcome = judged(run)
    assert 0 < outcome.promised < 150
    assert outcome.kept == 1.0
    assert all(call.finished for call in run.calls)  # the rest ran as best effort


def test_without_leftovers_what_is_not_promised_never_runs(engines: Engines) -> None:
    jobs = [job(n, 0.0, prompt=4000, ttft_s=0.5) for n in range(5)]
    run = simulate(engines, "slos-mh+known+noleftover", jobs)
    assert {bool(call.token_s) for call in run.calls} == {True, False}
    assert all(met(call) for call in run.calls if call.token_s)


def test_a_bounded_queue_refuses_what_comes_behind_it(engines: Engines) -> None:
    jobs = [job(n, 0.0 if n == 0 else 0.01, prompt=3000) for n in range(10)]
    run = simulate(engines, "vllm-bounded-4", jobs)
    assert sum(call.refused for call in run.calls) == 5  # one runs, four wait


def test_a_session_sends_its_next_call_after_the_gap(engines: Engines) -> None:
    stage = (Stage(StageKind.TOOL_CALL, 0.05, 8),)
    calls = (Call(600, 0, 1.0, stage), Call(800, 608, 1.0, stage, gap_s=2.5))
    run = simulate(engines, "slos-mh", [Job(0, "tool-agent", 0.0, calls)], prefix_caching=1)
    first, second = run.calls
    assert second.arrival_s == pytest.approx(first.token_s[-1] + 2.5)
    uncached = 800 - (600 + 8 - 1) // 16 * 16  # whole blocks of the history, whose last token was never computed
    assert second.token_s[0] - second.arrival_s == pytest.approx(PRESET.model.seconds(BatchShape(uncached)))
    assert judged(run).attainment == 1.0


def test_stages_have_their_own_time_per_token(engines: Engines) -> None:
    stages = (Stage(StageKind.THINK, 0.05, 30), Stage(StageKind.ANSWER, 0.1, 10))
    jobs = [Job(n, "reasoner", 0.0, (Call(100, 0, 0.5, stages),)) for n in range(4)]
    run = simulate(engines, "slos-mh+known", jobs)
    assert judged(run).attainment == 1.0
    assert {len(call.token_s) for call in run.calls} == {40}


def test_replicas_share_the_load(engines: Engines) -> None:
    jobs = [job(n, 0.0, prompt=2000, ttft_s=0.6) for n in range(8)]
    one, four = (judged(simulate(engines, "slos-mh+known", jobs, replicas=count)) for count in (1, 4))
    assert one.attainment < 1.0
    assert four.attainment == 1.0


def test_orders_gather_or_spread_the_calls(engines: Engines) -> None:
    jobs = [job(n, 0.2 * n, prompt=200, output=40, ttft_s=2.0) for n in range(12)]
    used = {}
    for system in ("slos-mh+known", "slos-mh+known+roundrobin"):
        clock = Clock()
        front = build_front(parse_systems(system)[0], engines, PRESET, TIERS, workload(jobs), clock, replicas=3)
        Simulation(clock, front, jobs).run()
        used[system] = [replica.steps > 0 for replica in front.replicas]
    assert used == {"slos-mh+known": [True, False, False], "slos-mh+known+roundrobin": [True, True, True]}


def test_a_session_returns_to_the_replica_that_holds_its_history(engines: Engines) -> None:
    stage = (Stage(StageKind.TOOL_CALL, 0.05, 8),)
    calls = (Call(600, 0, 1.0, stage), Call(800, 608, 1.0, stage, gap_s=1.0))
    jobs = [Job(n, "tool-agent", 0.7 * n, calls) for n in range(4)]
    run = simulate(engines, "slos-mh+known+roundrobin", jobs, prefix_caching=1, replicas=2)
    uncached_s = PRESET.model.seconds(BatchShape(800 - (600 + 8 - 1) // 16 * 16))
    second = [call for call in run.calls if call.index == 1]
    assert len(second) == 4
    assert all(call.token_s[0] - call.arrival_s < uncached_s + 0.06 for call in second)


def test_a_run_is_cut_once_too_much_is_missed(engines: Engines) -> None:
    jobs = [job(n, 0.01 * n, prompt=3000, ttft_s=0.3) for n in range(200)]
    clock = Clock()
    front = build_front(parse_systems("vllm-2048")[0], engines, PRESET, TIERS, workload(jobs), clock)
    run = Simulation(clock, front, jobs, most_missed=20).run()
    assert run.cut == "missed"
    assert len(run.calls) < 200


def test_best_effort_in_the_way_does_not_break_promises_when_memory_is_short(engines: Engines) -> None:
    """Prompts of mixed lengths and deadlines, far more than memory holds; best effort fills all that is left."""
    jobs = [
        job(
            n,
            0.22 * n,
            prompt=(3300, 400, 1700, 2400)[n % 4],
            output=60 + 37 * (n % 5),
            ttft_s=(1.1, 0.3, 0.55, 0.8)[n % 4],
        )
        for n in range(120)
    ]
    run = simulate(engines, "slos-mh+known", jobs, kv_blocks=900)
    outcome = judged(run)
    assert outcome.promised > 20
    assert outcome.promised < 120
    assert outcome.kept == 1.0
