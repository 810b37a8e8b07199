"""The tasks of a process whose clients shall not lose it over one of them: what ends by itself begins again.

Where a process is better begun anew as a whole, see `watched.py`.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from services.common.watched import WatchedTasks

__all__ = ["KeptTasks"]

_log = logging.getLogger(__name__)

Work = Callable[[], Coroutine[Any, Any, None]]


class KeptTasks:
    """Tasks that last as long as their process, by name.

    One that raises or returns is logged with its cause and begins again `again_s` seconds later; `on_failed` hears what
    it ran. From its end until it has run for `again_s` seconds again the process is not whole: `on_whole` hears False
    when the first task is down and True when none is any more.
    """

    def __init__(
        self,
        on_failed: Callable[[str], None] = lambda _: None,
        on_whole: Callable[[bool], None] = lambda _: None,
        *,
        again_s: float = 1.0,
    ) -> None:
        self._on_failed = on_failed
        self._on_whole = on_whole
        self._again_s = again_s
        self._tasks = WatchedTasks()
        self._down: set[str] = set()

    @property
    def whole(self) -> bool:
        """True while every task runs."""
        return not self._down

    def keep(self, name: str, work: Work) -> None:
        """Run `work` until it is cancelled. `name` is one that no running task has."""
        self._tasks.spawn(name, self._keep(name, work))

    async def cancel(self, *names: str) -> None:
        """Cancel tasks (all, where none is named) and wait until they have ended."""
        await self._tasks.cancel(*names)
        for name in names or tuple(self._down):
            self._up(name)

    async def _keep(self, name: str, work: Work) -> None:
        while True:
            steady = asyncio.get_running_loop().call_later(self._again_s, self._up, name)
            try:
                error = await _end_of(work())
            finally:
                steady.cancel()
            _log.error("task %r has ended by itself, it begins again in %g s", name, self._again_s, exc_info=error)
            self._on_failed(getattr(work, "__qualname__", name))
            before = self.whole
            self._down.add(name)
            if before:
                self._on_whole(False)
            await asyncio.sleep(self._again_s)

    def _up(self, name: str) -> None:
        before = self.whole
        self._down.discard(name)
        if self.whole and not before:
            self._on_whole(True)


async def _end_of(work: Coroutine[Any, Any, None]) -> BaseException | None:
    """What ended it; cancelling the task that waits here is passed on."""
    try:
        await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return error  # a library's own
    except Exception as error:
        return error
    return None
