"""`slosctl trace`: one trace from the local span files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.asynchronous import CommandError, run_async
from services.cli.target import DataDirOption, RedisOption, Target, find_target
from services.cli.waterfall import arrange, render_waterfall
from services.common.broker import connect
from services.common.request_store import RequestStore
from services.common.span_file import SpanRecord, read_spans

__all__ = ["TraceNotFoundError", "find_trace", "trace"]

_HEX = frozenset("0123456789abcdef")
_TRACE_ID_DIGITS = 32
_SHORTEST_PREFIX = 6


class TraceNotFoundError(CommandError):
    """No span of such a trace is on this machine; the text says where was looked."""


def _belongs_to_request(span: SpanRecord) -> bool:
    return span.name == "request"


def find_trace(directory: Path, trace_id: str | None) -> list[SpanRecord]:
    """All spans of the trace with this id (or a unique beginning of it); None: of the latest request."""
    if trace_id is not None and len(trace_id) == _TRACE_ID_DIGITS:
        spans = list(read_spans(directory, trace_id))
    else:
        everything = list(read_spans(directory))
        if trace_id is None:
            latest = max(filter(_belongs_to_request, everything), key=lambda span: span.end_us, default=None)
            chosen = {latest.trace_id} if latest else set()
        else:
            chosen = {span.trace_id for span in everything if span.trace_id.startswith(trace_id)}
        if len(chosen) > 1:
            raise TraceNotFoundError(f"{trace_id} is the beginning of {len(chosen)} traces; give more digits")
        spans = [span for span in everything if span.trace_id in chosen]
    if not arrange(spans):
        what = f"trace {trace_id}" if trace_id else "any request"
        raise TraceNotFoundError(
            f"no spans of {what} under {directory}. They are written within a second of the end of a span, "
            "and only where no OTLP endpoint is configured."
        )
    return spans


async def _trace_id_of_request(request_id: str, target: Target) -> str:
    if not target.redis_url:
        raise TraceNotFoundError(f"{request_id!r} is no trace id, and without --redis-url no request can be looked up")
    redis = await connect(target.redis_url, tries=1)
    try:
        record = await RequestStore(redis).get(request_id)
    finally:
        await redis.aclose()
    if record is None or not record.traceparent:
        raise TraceNotFoundError(
            f"Redis holds no request {request_id!r} with a trace (requests expire after their end)"
        )
    return record.traceparent.split("-")[1]


@run_async
async def trace(
    trace_id: Annotated[str, typer.Argument(help="Trace id, the beginning of one, or a request id.")] = "",
    last: Annotated[bool, typer.Option("--last", help="The latest request's trace.")] = False,
    rpc: Annotated[bool, typer.Option("--rpc", help="Show the gRPC client and server spans too.")] = False,
    data_dir: DataDirOption = Path(".slos"),
    redis_url: RedisOption = "",
) -> None:
    """Draw one request's trace as a waterfall."""
    if bool(trace_id) == last:
        raise typer.BadParameter("give a trace id, a request id, or --last")
    directory = data_dir / "traces"
    wanted: str | None = None if last else trace_id.lower()
    if wanted is not None and not (_SHORTEST_PREFIX <= len(wanted) <= _TRACE_ID_DIGITS and set(wanted) <= _HEX):
        wanted = await _trace_id_of_request(trace_id, find_target(data_dir, redis_url=redis_url))
    console = Console()
    console.print(render_waterfall(find_trace(directory, wanted), width=console.width, with_rpc=rpc))
