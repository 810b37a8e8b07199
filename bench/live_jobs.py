"""The jobs of one live round: a scenario at a load, cut to a duration, shortened to what a small model holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.prompts import PromptMaker
from bench.scenario import ScenarioFile
from bench.scenario_jobs import Call, Job, Stage, Workload, at_rate
from services.core.perf_model import PerfModel
from services.core.slo import StageKind, StageSlo, resolve_ttft_s

__all__ = ["Conversations", "Scale", "live_jobs"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How the recorded jobs are fitted to an engine and to the time there is.

    Lengths are divided, TPOTs multiplied; a stage has at most `stage_tokens` of output, so that a round ends.

    TTFTs given as slowdown follow by themselves: they are resolved on the engine's own performance model.
    """

    length_divisor: float = 1.0
    tpot_factor: float = 1.0
    stage_tokens: int = 1 << 20
    context_tokens: int = 32768


def live_jobs(
    workload: Workload, file: ScenarioFile, model: PerfModel, scale: Scale, *, rate: float, seconds: float
) -> tuple[Job, ...]:
    """The jobs that arrive within `seconds` at `rate` jobs/s; jobs longer than the context are left out."""
    jobs = (_scaled(job, file, model, scale) for job in at_rate(workload, rate) if job.arrival_s < seconds)
    return tuple(
        job
        for job in jobs
        if all(call.prompt_tokens + call.output_tokens <= scale.context_tokens for call in job.calls)
    )


def _scaled(job: Job, file: ScenarioFile, model: PerfModel, scale: Scale) -> Job:
    app = file.applications[job.application]
    calls = []
    for call in job.calls:
        prompt = max(1, round(call.prompt_tokens / scale.length_divisor))
        cached = min(prompt - 1, round(call.cached_tokens / scale.length_divisor))
        slo = StageSlo(StageKind.ANSWER, None, app.ttft_slowdown, 1.0, 1)
        ttft_s = resolve_ttft_s(slo, prompt - cached, model, file.ttft_floor_ms / 1000)
        assert ttft_s is not None, "the stage has a slowdown"
        stages = tuple(_scaled_stage(stage, scale) for stage in call.stages)
        calls.append(replace(call, prompt_tokens=prompt, cached_tokens=cached, ttft_s=ttft_s, stages=stages))
    return replace(job, calls=tuple(calls))


def _scaled_stage(stage: Stage, scale: Scale) -> Stage:
    tokens = min(scale.stage_tokens, max(1, round(stage.tokens / scale.length_divisor)))
    return replace(stage, tokens=tokens, tpot_s=stage.tpot_s * scale.tpot_factor)


class Conversations:
    """Prompts of jobs: random ids, and in a session the history with its real outputs before them.

    `round_seed` makes the prompts of every round new, so that no cache of an earlier one answers them.
    """

    def __init__(self, maker: PromptMaker, round_seed: int) -> None:
        self._maker = maker
        self._seed = round_seed
        self._history: dict[int, list[int]] = {}

    def prompt(self, job: Job, call: Call) -> tuple[int, ...]:
        """The prompt of a job's next call."""
        history = self._history.get(job.number, [])
        missing = call.prompt_tokens - len(history)
        seed = (self._seed * 1_000_003 + job.number) * 1009 + len(history)
        fresh = self._maker.random_ids(missing, seed) if missing > 0 else []
        return (*history, *fresh)[: call.prompt_tokens]

    def answered(self, job: Job, prompt: Sequence[int], output: Sequence[int]) -> None:
        """What became of the call."""
        self._history[job.number] = [*prompt, *output]
