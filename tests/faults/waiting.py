"""Waiting for what happens in other processes, and what is left when it has."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from bench.fault_load import Answer
from bench.fault_state import Leftovers, leftovers
from bench.task_watch import TaskWatch
from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec

LEFT_S = 40.0


class WatchedStack(LocalStack):
    """A stack whose processes report their tasks."""

    def __init__(self, spec: StackSpec, tasks: TaskWatch) -> None:
        super().__init__(replace(spec, service_environment=tasks.environments))
        self.tasks = tasks


async def until(true: Callable[[], bool | Awaitable[bool]], timeout_s: float = 60.0) -> None:
    """Look until it is so; what is waited for lies in other processes."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = true()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)


async def nothing_left(stack: WatchedStack, *, watched: bool = True) -> Leftovers:
    """What is left once all is quiet, tasks too where `watched`; what never goes fails the assertion after a while."""
    end_s = time.monotonic() + LEFT_S
    while True:
        left = await leftovers(stack, stack.tasks if watched else None)
        if left.none or time.monotonic() > end_s:
            return left
        await asyncio.sleep(0.1)


def wrong(answers: list[Answer]) -> list[str]:
    """Answers that are not whole, for a message that says why."""
    return [f"{a.request_id}: {len(a.ids)}/{a.wanted} {a.error}" for a in answers if not a.complete]
