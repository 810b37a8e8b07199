"""The asyncio tasks of a process by what they run, so that one that never ends is seen."""

import asyncio
from collections import Counter
from typing import Any

__all__ = ["count_tasks", "task_kind"]


def task_kind(task: "asyncio.Task[Any]") -> str:
    """The name of the coroutine function behind a task: few in number, whatever the requests."""
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", None) or type(coroutine).__name__)


def count_tasks(loop: asyncio.AbstractEventLoop) -> Counter[str]:
    """Live tasks of a loop by kind. May be called from another thread."""
    return Counter(task_kind(task) for task in asyncio.all_tasks(loop))
