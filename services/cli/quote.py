"""`slosctl quote`: would this request be promised now? Nothing is sent to an engine."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.answer_view import quote_view
from services.cli.asynchronous import EXIT_REJECTED, run_async
from services.cli.stage_option import parse_stages
from services.cli.target import AdmissionOption, DataDirOption, KeyOption, find_target
from services.client import GenerateOptions, SlosClient

__all__ = ["quote"]


@run_async
async def quote(
    prompt: Annotated[str, typer.Argument(help="Prompt text; - reads it from stdin.")],
    application: Annotated[str, typer.Option("--application", "-a", help="An application of the catalogue.")] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(help="A stage with its own SLO, such as ANSWER:ttft=800,tpot=60,max=64 (or slowdown=3). Repeat."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in the answer.")] = 64,
    templated: Annotated[
        bool, typer.Option("--templated", help="The prompt is a rendered chat template: read its control tokens.")
    ] = False,
    timeout_s: Annotated[float | None, typer.Option("--timeout", min=0.1, help="Deadline, seconds.")] = None,
    data_dir: DataDirOption = Path(".slos"),
    admission: AdmissionOption = "",
    key: KeyOption = "",
) -> None:
    """Ask whether a request would be promised now; if not, the tightest SLO that would be, and from when on.

    Exit status: 0 it fits, 1 failed, 3 it does not fit now.
    """
    stages = parse_stages(stage)
    options: GenerateOptions = {
        "application": application or ("" if stages else "chatbot"),
        "stages": stages,
        "max_tokens": max_tokens,
        "templated": templated,
    }
    target = find_target(data_dir, admission=admission)
    async with SlosClient(target.admission, key=key or None) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        found = await client.quote(text, timeout_s=timeout_s, **options)
    Console(highlight=False).print(quote_view(found, time.time_ns() // 1000))
    if not found.fits:
        raise typer.Exit(EXIT_REJECTED)
