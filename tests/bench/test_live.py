"""The live load generator: open loop between jobs, closed loop inside a session; what does not end is a miss."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bench import live
from bench.gpu import found_hardware
from bench.live_jobs import Conversations, Scale, live_jobs
from bench.live_report import Measured, attainment_plot, point_json, table
from bench.live_round import Round, Seen, run_round
from bench.live_stack import write_catalogue
from bench.metrics import outcome_of
from bench.prompts import PromptMaker, load_prompt_maker
from bench.scenario import load_scenarios
from bench.scenario_jobs import Call, Job, Stage, build_workload
from bench.simulator_call import LiveCall
from services.cli.stack_spec import BUNDLED_MODEL
from services.common.config import load_catalogue
from services.core.presets import preset
from services.core.slo import StageKind


class GatedTarget:
    """Answers each call once its gate is open; what is never opened never ends."""

    name, promises = "gated", True

    def __init__(self) -> None:
        self.prompts: dict[tuple[int, int], tuple[int, ...]] = {}
        self.gates: dict[tuple[int, int], asyncio.Event] = {}
        self.arrived = asyncio.Condition()

    def gate(self, job: int, index: int = 0) -> asyncio.Event:
        return self.gates.setdefault((job, index), asyncio.Event())

    async def send(self, call: LiveCall, prompt: tuple[int, ...], key: str) -> AsyncIterator[tuple[int, ...]]:
        place = (call.job.number, call.index)
        async with self.arrived:
            self.prompts[place] = prompt
            self.arrived.notify_all()
        call.promised_s = call.arrival_s
        await self.gate(*place).wait()
        for token in range(call.call.output_tokens):
            yield (1000 + token,)

    async def until(self, job: int, index: int = 0) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: (job, index) in self.prompts)


def job(number: int, *, calls: int = 1, arrival_s: float = 0.0, ttft_s: float = 5.0) -> Job:
    call = Call(6, 0, ttft_s, (Stage(StageKind.ANSWER, 1.0, 3),))
    later = Call(12, 9, ttft_s, (Stage(StageKind.ANSWER, 1.0, 3),), gap_s=0.0)
    return Job(number, "chatbot", arrival_s, (call, later)[:calls])


@pytest.fixture(scope="module")
def maker() -> PromptMaker:
    return load_prompt_maker(BUNDLED_MODEL / "tokenizer.json")


async def start(
    target: GatedTarget, jobs: list[Job], maker: PromptMaker, grace_s: float = 30.0
) -> "asyncio.Task[Round]":
    seen: list[Seen] = []
    return asyncio.create_task(
        run_round(target, jobs, Conversations(maker, 1), "t", seconds=1.0, grace_s=grace_s, on_change=seen.append)
    )


async def test_a_job_is_sent_at_its_time_although_the_one_before_still_runs(maker: PromptMaker) -> None:
    target = GatedTarget()
    round_ = await start(target, [job(0), job(1, arrival_s=0.01)], maker)
    await target.until(0)
    await target.until(1)  # nothing has been answered yet
    target.gate(0).set()
    target.gate(1).set()
    done = await round_
    assert [call.finished for call in done.calls] == [True, True]
    assert done.output_tokens == 6


async def test_a_sessions_next_call_continues_what_was_answered(maker: PromptMaker) -> None:
    target = GatedTarget()
    round_ = await start(target, [job(0, calls=2)], maker)
    await target.until(0)
    assert (0, 1) not in target.prompts
    target.gate(0).set()
    await target.until(0, 1)
    target.gate(0, 1).set()
    done = await round_
    first, second = target.prompts[0, 0], target.prompts[0, 1]
    assert second[:9] == (*first, 1000, 1001, 1002)
    assert len(second) == 12
    assert outcome_of(done.calls, 1, promises=True).attainment == 1.0


async def test_a_call_that_never_ends_is_cut_off_and_missed(maker: PromptMaker) -> None:
    target = GatedTarget()
    target.gate(0).set()
    done = await (await start(target, [job(0), job(1, ttft_s=0.01)], maker, grace_s=-1.9))
    outcome = outcome_of(done.calls, 2, promises=True)
    assert outcome.attainment == 0.5
    assert outcome.kept == 0.5


async def test_a_report_names_every_broken_promise_and_by_how_much(maker: PromptMaker, tmp_path: Path) -> None:
    target = GatedTarget()
    target.gate(0).set()
    target.gate(1).set()
    done = await (await start(target, [job(0), job(1, ttft_s=1e-9)], maker))
    outcome = outcome_of(done.calls, 2, promises=True)
    points = [Measured(name, rate, 0, outcome, done, (1, 2)) for name in ("vllm", "slos-serve") for rate in (1.0, 2.0)]
    written = json.loads(json.dumps(point_json(points[0])))
    [miss] = written["misses"]
    assert miss["application"] == "chatbot"
    assert miss["ttft_late_ms"] > 0
    assert written["outcome"]["kept"] == 0.5
    assert "| slos-serve, 2.00/s | 0.500 | 0.500 | 2 | 0.500 |" in table(points, "test")
    attainment_plot(points, "test", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_lengths_shrink_and_ttfts_follow_the_engines_own_model() -> None:
    file, shape = load_scenarios(), preset("opt-6.7b-a100")
    workload = build_workload(file, "mixed", shape.model)
    whole = live_jobs(workload, file, shape.model, Scale(), rate=workload.rate, seconds=30.0)
    short = live_jobs(workload, file, shape.model, Scale(4.0, 2.0, 100), rate=workload.rate, seconds=30.0)
    assert [job.number for job in whole] == [job.number for job in short]
    for before, after in zip(whole, short, strict=True):
        assert after.calls[0].prompt_tokens == max(1, round(before.calls[0].prompt_tokens / 4))
        assert 0.1 <= after.calls[0].ttft_s <= before.calls[0].ttft_s
        assert max(stage.tokens for stage in after.calls[0].stages) <= 100
        assert after.calls[0].stages[0].tpot_s == 2 * before.calls[0].stages[0].tpot_s
    assert len(
        live_jobs(workload, file, shape.model, Scale(context_tokens=200), rate=workload.rate, seconds=30.0)
    ) < len(whole)


def test_every_scenario_file_becomes_a_catalogue_that_the_services_accept(tmp_path: Path) -> None:
    file = load_scenarios()
    catalogue = load_catalogue(write_catalogue(file, tmp_path / "catalogue.yaml"))
    assert set(catalogue.applications) == set(file.applications)
    assert {tier.name for tier in catalogue.tier_list()} == set(file.tiers)


def test_without_a_gpu_the_result_is_named_after_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    emulated, cpu = found_hardware("emulated"), found_hardware("cpu")
    assert (emulated.gpu, emulated.label) == (None, "none-emulated")
    assert (cpu.gpu, cpu.label) == (None, "none-cpu")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the measurements that the command begins, none of which runs."""
    names: list[str] = []
    monkeypatch.setattr(live, "run_interruptible", lambda work: (names.append(work.__name__), work.close()))
    return names


def run_live(*options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command("live")(live.main)
    result = CliRunner().invoke(app, options)
    return result.exit_code, " ".join(re.sub("[^a-z0-9:-]+", " ", result.output).split())


@pytest.mark.parametrize(
    "option",
    [
        *("--rates=1", "--window=1", "--seconds=60", "--repetitions=1"),
        *("--length-divisor=4", "--tpot-factor=1", "--stage-tokens=800", "--traces=somewhere"),
    ],
)
def test_saturate_refuses_what_it_would_ignore_even_at_its_default(option: str, started: list[str]) -> None:
    status, text = run_live("--saturate", option)
    assert (status, started) == (2, [])
    assert f"it takes no {option.partition('=')[0]}" in text


def test_saturate_names_all_that_it_refuses(started: list[str]) -> None:
    status, text = run_live("--saturate", "--seconds=30", "--length-divisor=8")
    assert (status, started) == (2, [])
    assert "it takes no --seconds --length-divisor" in text


def test_saturate_takes_what_it_heeds(started: list[str]) -> None:
    options = ("--engine=vllm", "--shape=smollm2-135m", "--scenario=chatbot", "--seed=2", "--async-scheduling")
    assert run_live("--saturate", *options)[0] == 0
    assert run_live("--seconds=30", "--length-divisor=8")[0] == 0
    assert started == ["saturate", "_live"]


@pytest.mark.parametrize("option", ["--engine=vllm", "--model=x", "--repetitions=2", "--saturate"])
def test_virtual_refuses_what_it_would_ignore(option: str, started: list[str]) -> None:
    status, text = run_live("--virtual", option)
    assert (status, started) == (2, [])
    assert "--virtual is for presets" in text


def test_virtual_runs_the_jobs_of_a_load_on_both_schedulers(tmp_path: Path) -> None:
    options = ("--rates=6", "--seconds=6", "--preset=llama-3.1-8b-h200", "--async-scheduling", f"--results={tmp_path}")
    status, _ = run_live("--virtual", *options)
    assert status == 0
    result = json.loads((tmp_path / "virtual-llama-3.1-8b-h200-mixed.json").read_text())
    ours, plain = (
        next(point["outcome"] for point in result["points"] if point["system"].startswith(name))
        for name in ("slos", "vllm")
    )
    assert ours["jobs"] == plain["jobs"] > 10
    assert ours["promised"] > 0 == plain["promised"]
    assert ours["attainment"] >= plain["attainment"]
