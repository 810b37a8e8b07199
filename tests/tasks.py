"""Asyncio tasks that should be gone."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.tasks import count_tasks, task_kind

PATIENCE_S = 5.0
_NETWORK = ("TcpProxy._pump",)  # of the tests themselves: they live as long as the connections that they carry


@asynccontextmanager
async def no_task_left() -> AsyncIterator[None]:
    """Whatever is started inside, clients and services alike, has ended a moment after the block."""
    before = asyncio.all_tasks()
    yield
    known = {*before, asyncio.current_task()}  # a fixture is torn down in a task of its own
    new = {task for task in asyncio.all_tasks() - known if task_kind(task) not in _NETWORK}
    if new:
        await asyncio.wait(new, timeout=PATIENCE_S)
    left = [task for task in asyncio.all_tasks() - known if task_kind(task) not in _NETWORK]
    assert not left, f"tasks left behind: {sorted(f'{task_kind(task)} ({task.get_name()})' for task in left)}"


class IdleTasks:
    """The tasks of services that stand idle; after some work there must be no more of any kind."""

    def __init__(self) -> None:
        self._idle = count_tasks(asyncio.get_running_loop())

    @property
    def surplus(self) -> Counter[str]:
        """Tasks beyond the idle ones, by kind."""
        return count_tasks(asyncio.get_running_loop()) - self._idle

    async def returned(self) -> None:
        """Return once there are no more tasks than at first; fails after a while."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self.surplus:  # noqa: ASYNC110 - tasks announce nothing
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"tasks left behind: {dict(self.surplus)}") from None
