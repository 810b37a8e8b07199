"""Waiting for what happens in other processes, and what is left when it has."""

import asyncio
from collections.abc import Awaitable, Callable

from bench.fault_load import Answer
from bench.fault_state import Leftovers, leftovers
from services.cli.stack import LocalStack


async def until(true: Callable[[], bool | Awaitable[bool]], timeout_s: float = 60.0) -> None:
    """Look until it is so; what is waited for lies in other processes."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = true()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)


async def nothing_left(stack: LocalStack) -> Leftovers:
    """What is left once all is quiet; what never goes fails the assertion after a while."""
    left = await leftovers(stack)
    for _ in range(200):
        if left.none:
            break
        await asyncio.sleep(0.1)
        left = await leftovers(stack)
    return left


def wrong(answers: list[Answer]) -> list[str]:
    """Answers that are not whole, for a message that says why."""
    return [f"{a.request_id}: {len(a.ids)}/{a.wanted} {a.error}" for a in answers if not a.complete]
