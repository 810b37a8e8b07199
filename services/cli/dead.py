"""`slosctl dead`: requests that were given up because they killed their workers, or could not be read."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, cast

import typer
from redis.asyncio import Redis
from rich.console import Console
from rich.table import Table

from protos import types_pb2
from services.cli.asynchronous import CommandError, run_async
from services.cli.submit import show_reply
from services.cli.target import AdmissionOption, DataDirOption, KeyOption, RedisOption, find_target
from services.client import GenerateOptions, SlosClient, Stage
from services.common.broker import connect
from services.common.dead_letters import DeadLetter, read_dead_letters, remove_dead_letter

__all__ = ["dead", "letter_options"]

dead = typer.Typer(help="Requests that were given up: list them, or send one again.", no_args_is_help=True)


def _table(letters: Sequence[DeadLetter]) -> Table:
    table = Table(title="dead letters", title_justify="left", title_style="bold", header_style="dim", box=None)
    for header in ("letter", "request", "application", "tenant", "tokens in", "attempts", "since", "why"):
        table.add_column(header, overflow="fold", no_wrap=header == "letter")  # to be copied into `redrive`
    for letter in letters:
        since = datetime.fromtimestamp(letter.buried_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S")
        tokens = "-" if letter.request is None else str(len(letter.request.prompt_token_ids))
        row = (letter.letter_id, letter.request_id, letter.application, letter.tenant, tokens, str(letter.deliveries))
        table.add_row(*row, since, letter.reason)
    return table


def letter_options(request: types_pb2.QueuedRequest) -> GenerateOptions:
    """What to ask for again, as the client did; an application's own stages are those in force now."""
    sampling = request.sampling
    options: GenerateOptions = {"stop": tuple(sampling.stop)}
    for name in (
        *("max_tokens", "temperature", "top_p", "top_k", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos"),
    ):
        if sampling.HasField(name):
            options[name] = getattr(sampling, name)
    if request.application != "custom":
        options["application"] = request.application
        return options
    options["stages"] = tuple(
        Stage(
            kind=cast("Literal['THINK', 'TOOL_CALL', 'ANSWER']", _kind(stage)),
            ttft_ms=stage.ttft_ms or None,
            tpot_ms=stage.tpot_ms,
            max_tokens=stage.max_tokens,
        )
        for stage in request.stages
    )
    return options


def _kind(stage: types_pb2.Stage) -> str:
    return types_pb2.StageKind.Name(stage.kind).removeprefix("STAGE_KIND_")


async def _redis(data_dir: Path, redis_url: str) -> Redis:
    target = find_target(data_dir, redis_url=redis_url)
    if not target.redis_url:
        raise CommandError(f"no stack runs in {data_dir}: give --redis-url or SLOS_REDIS_URL")
    return await connect(target.redis_url, tries=1)


@dead.command("list")
@run_async
async def list_letters(data_dir: DataDirOption = Path(".slos"), redis_url: RedisOption = "") -> None:
    """Show every dead letter: which request, how often it was tried, and why it was given up."""
    redis = await _redis(data_dir, redis_url)
    try:
        letters = await read_dead_letters(redis)
        Console().print(_table(letters) if letters else "no dead letters")
    finally:
        await redis.aclose()


@dead.command("redrive")
@run_async
async def redrive(
    letter: Annotated[str, typer.Argument(help="The letter's id, or its request's id.")],
    data_dir: DataDirOption = Path(".slos"),
    redis_url: RedisOption = "",
    admission: AdmissionOption = "",
    key: KeyOption = "",
) -> None:
    """Send a dead letter's request again, as a new request, and stream its answer; then remove the letter.

    It goes through the front door like any other. The letter stays where the request fails again.
    """
    redis = await _redis(data_dir, redis_url)
    try:
        found = [one for one in await read_dead_letters(redis) if letter in (one.letter_id, one.request_id)]
        if not found:
            raise CommandError(f"no dead letter {letter}")
        chosen = found[-1]
        if chosen.request is None:
            raise CommandError(f"dead letter {chosen.letter_id} is no request: {chosen.reason}")
        async with SlosClient(find_target(data_dir, admission=admission).admission, key=key or None) as client:
            prompt = list(chosen.request.prompt_token_ids)
            finished = await show_reply(client.generate(prompt, **letter_options(chosen.request)))
        if finished.reason not in ("STOP", "LENGTH"):
            raise CommandError(f"the request did not run to its end: {finished.reason}; its letter stays")
        await remove_dead_letter(redis, chosen.letter_id)
    finally:
        await redis.aclose()
