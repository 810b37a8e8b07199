"""`slosctl submit`: one request. The text goes to stdout, everything about it to stderr."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.cli.asynchronous import CommandError, run_async
from services.cli.reply_view import finish_line, stage_table, verdict_line
from services.cli.stage_option import StageOptionError, parse_stage
from services.cli.target import AdmissionOption, DataDirOption, KeyOption, find_target
from services.common.rpc import open_channel

__all__ = ["submit"]

EXIT_SLO_MISSED = 4

_ON_INFEASIBLE = {
    "default": types_pb2.ON_INFEASIBLE_UNSPECIFIED,
    "best-effort": types_pb2.ON_INFEASIBLE_BEST_EFFORT,
    "reject": types_pb2.ON_INFEASIBLE_REJECT,
    "wait": types_pb2.ON_INFEASIBLE_WAIT,
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
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 if an SLO was missed.")] = False,
    data_dir: DataDirOption = Path(".slos"),
    admission: AdmissionOption = "",
    key: KeyOption = "",
) -> None:
    """Send one request, stream its text, and show what was promised and what was delivered.

    Exit status: 0 answered, 1 failed, 3 rejected for now (try again later), 4 an SLO was missed (with --strict).
    """
    try:
        stages = [parse_stage(text) for text in stage or ()]
    except StageOptionError as error:
        raise typer.BadParameter(str(error), param_hint="--stage") from None
    if not application and not stages:
        application = "chatbot"
    request = admission_pb2.GenerateRequest(
        text=sys.stdin.read() if prompt == "-" else prompt,
        application=application,
        stages=stages,
        sampling=types_pb2.Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or ()),
        on_infeasible=_ON_INFEASIBLE[on_infeasible],
    )
    target = find_target(data_dir, admission=admission)
    finished = await _stream(request, target.admission, key, timeout_s)
    if finished.reason not in (types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH):
        raise CommandError("the request did not run to its end")
    if strict and not finished.met:
        raise typer.Exit(EXIT_SLO_MISSED)


async def _stream(
    request: admission_pb2.GenerateRequest, address: str, key: str, timeout_s: float | None
) -> admission_pb2.Finished:
    """Print the answer as it comes; its last message."""
    notes = Console(stderr=True, highlight=False)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    async with open_channel(address, traced=False) as channel:
        stub = admission_pb2_grpc.AdmissionStub(channel)
        async for event in stub.Generate(request, metadata=metadata, timeout=timeout_s):
            match event.WhichOneof("event"):
                case "verdict":
                    notes.print(verdict_line(event.verdict))
                case "verdict_changed":
                    notes.print()
                    notes.print(verdict_line(event.verdict_changed.verdict), event.verdict_changed.reason)
                case "tokens":
                    sys.stdout.write(event.tokens.text)
                    sys.stdout.flush()
                case "finished":
                    sys.stdout.write("\n")
                    sys.stdout.flush()
                    notes.print(stage_table(event.finished))
                    notes.print(finish_line(event.finished))
                    return event.finished
                case _:
                    pass  # stage ends come again in the last message
    raise CommandError("the stream ended without a last message")
