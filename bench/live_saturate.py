"""Throughput with best effort only: everything there is to do is there at once, and nothing is promised.

The planner is not there, which is how a fleet runs without promises: every request is best effort, so that no batch is
shortened for promises to come, and the hook, the queues and the services are all on the way.
"""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.live_jobs import Conversations
from bench.live_round import Round, run_round
from bench.live_stack import sides
from bench.live_targets import Target
from bench.prompts import load_prompt_maker
from bench.report_files import markdown_table, provenance, write_result
from bench.scenario import ScenarioFile
from bench.scenario_jobs import Call, Job, Stage
from services.core.slo import StageKind
from services.worker.engine_settings import EngineSettings

__all__ = ["saturate"]

_REQUESTS = {"emulated": 192, "vllm": 96}
_PROMPT_TOKENS = {"emulated": 256, "vllm": 96}
_OUTPUT_TOKENS = {"emulated": 128, "vllm": 96}
_ROUNDS = 3
_LONG_S = 600.0


async def saturate(console: Console, settings: EngineSettings, file: ScenarioFile, seed: int, results: Path) -> None:
    """Both systems in turn, `_ROUNDS` rounds after one that is not counted; total tokens per second of each."""
    rounds: dict[str, list[Round]] = {}
    async with sides(settings, file, settings.data_dir, planner=False) as side:
        maker = load_prompt_maker(Path(settings.model) / "tokenizer.json")
        jobs = _jobs(settings.engine, next(iter(file.applications)))
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
    rates = {name: [_tokens_per_s(done) for done in mine] for name, mine in rounds.items()}
    share = float(np.median(rates["slos-serve"]) / np.median(rates["vllm"]))
    promised = sum(call.promised_s is not None for mine in rounds.values() for done in mine for call in done.calls)
    rows = [
        [name, *(f"{rate:.0f}" for rate in found), f"{np.median(found):.0f}",
         f"{np.mean([done.share.others for done in rounds[name]]):.2f}"]
        for name, found in rates.items()
    ]  # fmt: skip
    header = [f"tokens/s, {settings.engine} {side.measured.name}", *(f"round {n + 1}" for n in range(_ROUNDS)),
              "median", "other load, cores"]  # fmt: skip
    text = markdown_table(header, rows)
    text += f"\n{len(jobs)} requests at once, none promised: {share:.1%} of plain vLLM (bar 97 %).\n"
    result: dict[str, Any] = {
        "kind": "saturate",
        "settings": {"engine": settings.engine, "seed": seed, "requests": len(jobs), "promised": promised,
                     "async_scheduling": settings.async_scheduling},
        "tokens_per_s": rates,
        "share_of_vllm": share,
        "machine": {name: [asdict(done.share) for done in mine] for name, mine in rounds.items()},
        **provenance(side.measured),
    }  # fmt: skip
    path = write_result(results, f"saturate-{settings.engine}-{side.measured.name}", result, text)
    console.print(text)
    console.print(f"written: {path} and .md")


def _tokens_per_s(done: Round) -> float:
    """Prompt and output tokens of finished calls, per second until the last of them."""
    tokens = sum(call.call.prompt_tokens + len(call.token_s) for call in done.calls if call.finished)
    return tokens / max(call.token_s[-1] for call in done.calls if call.finished)


def _jobs(engine: str, application: str) -> list[Job]:
    output = _OUTPUT_TOKENS[engine]
    call = Call(_PROMPT_TOKENS[engine], 0, _LONG_S / 2, (Stage(StageKind.ANSWER, 1.0, output),))
    return [Job(number, application, 0.0, (call,)) for number in range(_REQUESTS[engine])]
