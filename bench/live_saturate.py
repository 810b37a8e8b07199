"""Throughput with best effort only: everything there is to do is there at once, and nothing is promised.

The planner is not there, which is how a fleet runs without promises: every request is best effort, so that no batch is
shortened for promises to come, and the hook, the queues and the services are all on the way.
"""

import asyncio
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.live_jobs import Conversations
from bench.live_round import Round, run_round
from bench.live_stack import Side, sides
from bench.live_targets import Target
from bench.prompts import load_prompt_maker
from bench.report_files import markdown_table, provenance, write_result
from bench.scenario import ScenarioFile
from bench.scenario_jobs import Call, Job, Stage
from services.core.slo import StageKind
from services.worker.engine_settings import EngineSettings

__all__ = ["LOADS", "Saturated", "saturate", "saturated_rounds"]

LOADS = {"emulated": (192, 256, 128), "vllm": (96, 96, 96)}  # requests, prompt tokens, output tokens of each
_ROUNDS = 3
_LONG_S = 600.0


@dataclass(frozen=True, slots=True)
class Saturated:
    """Counted rounds of both systems, by name: vllm and slos-serve."""

    requests: int
    rounds: dict[str, list[Round]]

    @property
    def tokens_per_s(self) -> dict[str, list[float]]:
        """Total tokens per second of every round."""
        return {name: [_tokens_per_s(done) for done in mine] for name, mine in self.rounds.items()}

    @property
    def share_of_vllm(self) -> float:
        """Ratio of the two medians."""
        rates = self.tokens_per_s
        return float(np.median(rates["slos-serve"]) / np.median(rates["vllm"]))

    def markdown(self, what: str) -> str:
        """A table and a sentence."""
        rows = [
            [name, *(f"{rate:.0f}" for rate in found), f"{np.median(found):.0f}",
             f"{np.mean([done.share.others for done in self.rounds[name]]):.2f}"]
            for name, found in self.tokens_per_s.items()
        ]  # fmt: skip
        header = [f"tokens/s, {what}", *(f"round {n + 1}" for n in range(_ROUNDS)), "median", "other load, cores"]
        share = f"{self.requests} requests at once, none promised: {self.share_of_vllm:.1%} of plain vLLM (bar 97 %)."
        return f"{markdown_table(header, rows)}\n{share}\n"

    def as_json(self) -> dict[str, Any]:
        """What a result file keeps."""
        calls = [call for mine in self.rounds.values() for done in mine for call in done.calls]
        return {
            "requests": self.requests,
            "promised": sum(call.promised_s is not None for call in calls),
            "tokens_per_s": self.tokens_per_s,
            "share_of_vllm": self.share_of_vllm,
            "machine": {name: [asdict(done.share) for done in mine] for name, mine in self.rounds.items()},
        }


async def saturate(console: Console, settings: EngineSettings, file: ScenarioFile, seed: int, results: Path) -> None:
    """Start both systems, run the rounds, and write the result."""
    async with sides(settings, file, settings.data_dir, planner=False) as side:
        found = await saturated_rounds(console, side, settings, file, seed, *LOADS[settings.engine])
    text = found.markdown(f"{settings.engine} {side.measured.name}")
    result: dict[str, Any] = {
        "kind": "saturate",
        "settings": {
            "engine": settings.engine, "seed": seed, "requests": found.requests,
            "async_scheduling": settings.async_scheduling,
        },
        **found.as_json(),
        **provenance(side.measured),
    }  # fmt: skip
    path = write_result(results, f"saturate-{settings.engine}-{side.measured.name}", result, text)
    console.print(text)
    console.print(f"written: {path} and .md")


async def saturated_rounds(
    console: Console,
    side: Side,
    settings: EngineSettings,
    file: ScenarioFile,
    seed: int,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
) -> Saturated:
    """Both systems in turn, `_ROUNDS` rounds after one that is not counted. The stack must be without a planner."""
    rounds: dict[str, list[Round]] = {}
    maker = load_prompt_maker(Path(settings.model) / "tokenizer.json")
    jobs = _jobs(next(iter(file.applications)), requests, prompt_tokens, output_tokens)
    for number in range(_ROUNDS + 1):
        both: tuple[Target, ...] = (side.bare, side.services)
        for target in both if number % 2 == 0 else both[::-1]:
            await asyncio.sleep(1.0)  # the lapse of one system's last work is not the other's
            done = await run_round(
                target, jobs, Conversations(maker, seed * 1000 + number), f"{target.name}-s{number}",
                seconds=1.0, grace_s=_LONG_S, on_change=lambda _: None,
            )  # fmt: skip
            console.print(f"{target.name}: {_tokens_per_s(done):.0f} tokens/s")
            if number:
                rounds.setdefault(target.name, []).append(done)
    return Saturated(requests, rounds)


def _tokens_per_s(done: Round) -> float:
    """Prompt and output tokens of finished calls, per second until the last of them."""
    tokens = sum(call.call.prompt_tokens + len(call.token_s) for call in done.calls if call.finished)
    return tokens / max(call.token_s[-1] for call in done.calls if call.finished)


def _jobs(application: str, requests: int, prompt_tokens: int, output_tokens: int) -> list[Job]:
    call = Call(prompt_tokens, 0, _LONG_S / 2, (Stage(StageKind.ANSWER, 1.0, output_tokens),))
    return [Job(number, application, 0.0, (call,)) for number in range(requests)]
