"""Work that nobody awaits: kept from being collected, its failures logged and counted."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from services.common.tasks import task_kind

__all__ = ["Background"]

_log = logging.getLogger(__name__)


class Background:
    """Tasks of this process that outlive the call that started them. `on_failed` hears what failed."""

    def __init__(self, on_failed: Callable[[str], None] = lambda _: None) -> None:
        self._on_failed = on_failed
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run `work`; an error is logged under `name`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def close(self) -> None:
        """Cancel what still runs."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Let what runs end by itself for up to `timeout_s`."""
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=timeout_s)

    def failed(self, what: str, kind: str, error: BaseException) -> None:
        """Something failed that was not begun here: logged as `what`, counted under `kind`."""
        _log.error("%s failed", what, exc_info=error)
        self._on_failed(kind)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed(task.get_name(), task_kind(task), error)
