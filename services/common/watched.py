"""The tasks that run as long as their process does, by name. One that ends by itself has failed."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from services.common.errors import Reason, SloServeError

__all__ = ["WatchedTasks"]

_log = logging.getLogger(__name__)

_CANCEL_AGAIN_S = 0.5


class WatchedTasks:
    """Named tasks: start, watch, cancel."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task."""
        self._tasks[name] = asyncio.create_task(work, name=name)

    async def watch(self, stop: asyncio.Event) -> None:
        """Wait for `stop`. Raises the error of a task that ended before."""
        await self.until(asyncio.create_task(stop.wait(), name="stopped"), stop)

    async def until(self, event: "asyncio.Task[Any]", stop: asyncio.Event) -> bool:
        """Wait for an event, or `stop` (False). Raises the error of the event, or of a task that ended before.

        What waits for the event is cancelled where it did not come.
        """
        stopped = asyncio.create_task(stop.wait(), name="stop")
        try:
            while not event.done() and not stopped.done():
                await asyncio.wait({event, stopped, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
                self._raise_failure()
            if event.done():
                event.result()
            return event.done()
        finally:
            for task in (event, stopped):
                task.cancel()
            await asyncio.gather(event, stopped, return_exceptions=True)

    async def cancel(self, *names: str) -> None:
        """Cancel tasks (all, where none is named) and wait until they have ended."""
        tasks = {self._tasks.pop(name) for name in names or tuple(self._tasks) if name in self._tasks}
        pending = tasks
        while pending:  # a library may swallow a cancellation that meets its own timeout: ask again
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
        for task in tasks:
            if not task.cancelled() and task.exception() is not None:
                _log.debug("task %s ended with %r", task.get_name(), task.exception())

    def _raise_failure(self) -> None:
        for name, task in self._tasks.items():
            if task.done() and not task.cancelled():
                _log.error("task %r has ended, and this process with it", name)
                task.result()
                raise SloServeError(Reason.INTERNAL, f"task {name!r} has ended")
