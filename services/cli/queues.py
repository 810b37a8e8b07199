"""`slosctl queues`: depth, age and consumers of every queue, from Redis alone."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.cli.asynchronous import CommandError, run_async
from services.cli.queue_rows import QueueRow, read_queues
from services.cli.target import DataDirOption, RedisOption, find_target
from services.common.broker import connect

__all__ = ["queue_table", "queues"]


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def queue_table(rows: Sequence[QueueRow]) -> Table:
    """The rows as a table."""
    table = Table(title="queues", title_justify="left", title_style="bold", header_style="dim", box=None)
    for header in ("replica", "tier"):
        table.add_column(header)
    for header in ("depth", "waiting", "pending", "oldest"):
        table.add_column(header, justify="right")
    table.add_column("consumers")
    for row in rows:
        table.add_row(
            row.replica,
            row.tier,
            str(row.depth),
            str(row.waiting),
            str(row.pending),
            _age(row.oldest_age_s),
            ", ".join(row.consumers) or "none",
            style="dim" if row.depth == 0 else "",
        )
    return table


@run_async
async def queues(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between refreshes.")] = 0.5,
    data_dir: DataDirOption = Path(".slos"),
    redis_url: RedisOption = "",
) -> None:
    """Show every queue: entries, how many a worker has taken, the age of the oldest, who consumes."""
    target = find_target(data_dir, redis_url=redis_url)
    if not target.redis_url:
        raise CommandError(f"no stack runs in {data_dir}: give --redis-url or SLOS_REDIS_URL")
    redis = await connect(target.redis_url, tries=1)
    try:
        if not watch:
            rows = await read_queues(redis)
            Console().print(queue_table(rows) if rows else "no queues: no worker has registered here yet")
            return
        with Live(queue_table(await read_queues(redis)), auto_refresh=False) as live:
            while True:
                await asyncio.sleep(interval_s)
                live.update(queue_table(await read_queues(redis)), refresh=True)
    finally:
        await redis.aclose()
