"""Tasks that last as long as their process: one that ends by itself is not missed."""

import asyncio

import pytest

from services.common.errors import SloServeError
from services.common.watched import WatchedTasks


async def for_ever() -> None:
    await asyncio.Event().wait()


async def test_watching_ends_when_told() -> None:
    tasks, stop = WatchedTasks(), asyncio.Event()
    tasks.spawn("steady", for_ever())
    watching = asyncio.ensure_future(tasks.watch(stop))
    stop.set()
    await watching
    await tasks.cancel()


async def test_the_error_of_a_task_is_raised() -> None:
    async def breaks() -> None:
        raise ValueError("broken")

    tasks = WatchedTasks()
    tasks.spawn("steady", for_ever())
    tasks.spawn("tally", breaks())
    with pytest.raises(ValueError, match="broken"):
        await tasks.watch(asyncio.Event())
    await tasks.cancel()


async def test_a_task_that_just_returns_is_an_error_that_names_it() -> None:
    async def returns() -> None:
        return

    tasks = WatchedTasks()
    tasks.spawn("orphanage", returns())
    with pytest.raises(SloServeError, match="orphanage"):
        await tasks.watch(asyncio.Event())
