"""`slosctl submit`: one request. The text goes to stdout, everything about it to stderr."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console

from services.cli.asynchronous import CommandError, run_async
from services.cli.reply_view import finish_line, stage_table, verdict_line
from services.cli.stage_option import parse_stages
from services.cli.target import AdmissionOption, DataDirOption, KeyOption, find_target
from services.client import (
    Event,
    Finished,
    GenerateOptions,
    OnInfeasible,
    SlosClient,
    StageEnd,
    Tokens,
    Verdict,
    VerdictChanged,
)

__all__ = ["show_reply", "submit"]

EXIT_SLO_MISSED = 4

_ON_INFEASIBLE: Final[dict[str, OnInfeasible | None]] = {
    "default": None,
    "best-effort": "BEST_EFFORT",
    "reject": "REJECT",
    "wait": "WAIT",
}


@run_async
async def submit(
    prompt: Annotated[str, typer.Argument(help="Prompt text; - reads it from stdin.")],
    application: Annotated[str, typer.Option("--application", "-a", help="An application of the catalogue.")] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(help="A stage with its own SLO, such as ANSWER:ttft=800,tpot=60,max=64 (or slowdown=3). Repeat."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in the answer.")] = 64,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's own.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string. Repeat.")] = None,
    on_infeasible: Annotated[
        Literal["default", "best-effort", "reject", "wait"], typer.Option(help="When no promise can be made.")
    ] = "default",
    timeout_s: Annotated[float | None, typer.Option("--timeout", min=0.1, help="Deadline, seconds.")] = None,
    templated: Annotated[
        bool, typer.Option("--templated", help="The prompt is a rendered chat template: read its control tokens.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 if an SLO was missed.")] = False,
    data_dir: DataDirOption = Path(".slos"),
    admission: AdmissionOption = "",
    key: KeyOption = "",
) -> None:
    """Send one request, stream its text, and show what was promised and what was delivered.

    Exit status: 0 answered, 1 failed, 3 rejected for now (try again later), 4 an SLO was missed (with --strict).
    """
    stages = parse_stages(stage)
    if not application and not stages:
        application = "chatbot"
    options: GenerateOptions = {
        "application": application,
        "stages": stages,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": stop or (),
        "on_infeasible": _ON_INFEASIBLE[on_infeasible],
        "templated": templated,
    }
    target = find_target(data_dir, admission=admission)
    async with SlosClient(target.admission, key=key or None) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        finished = await show_reply(client.generate(text, timeout_s=timeout_s, **options))
    if finished.reason not in ("STOP", "LENGTH"):
        raise CommandError(f"the request did not run to its end: {finished.reason}")
    if strict and not finished.met:
        raise typer.Exit(EXIT_SLO_MISSED)


def _printable(text: str) -> str:
    """A model's text fit for a terminal: no control characters, which could do anything to it."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


async def show_reply(events: AsyncIterator[Event]) -> Finished:
    """Print the answer as it comes; its last event."""
    notes = Console(stderr=True, highlight=False)
    async for event in events:
        match event:
            case Verdict():
                notes.print(verdict_line(event))
            case VerdictChanged():
                notes.print()
                notes.print(verdict_line(event.verdict), event.reason)
            case Tokens():
                sys.stdout.write(_printable(event.text) if sys.stdout.isatty() else event.text)
                sys.stdout.flush()
            case Finished():
                sys.stdout.write("\n")
                sys.stdout.flush()
                notes.print(stage_table(event.stages))
                notes.print(finish_line(event))
                return event
            case StageEnd():
                pass  # comes again in the last event
    raise CommandError("the stream ended without a last message")
