"""Running a measurement so that ending it early, by Ctrl-C or SIGTERM, stops everything it has started."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["run_interruptible"]

T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end; SIGTERM cancels it as Ctrl-C does, and it cleans up before this returns."""

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None, "asyncio.run made one"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
