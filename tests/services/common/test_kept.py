"""Tasks that begin again where they end by themselves, and what is seen of that."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from services.common.kept import KeptTasks

PATIENCE_S = 10.0


class Watched:
    """Kept tasks, and a record of what was heard about them."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.whole: list[bool] = []
        self.news = asyncio.Event()
        self.tasks = KeptTasks(self._failed, self._whole, again_s=0.0)

    def _failed(self, kind: str) -> None:
        self.failed.append(kind)

    def _whole(self, whole: bool) -> None:
        self.whole.append(whole)
        self.news.set()


def ending(*ends: Callable[[], None]) -> tuple[Any, asyncio.Event]:
    """Work that ends in one way after the other, then sets the event and lasts."""
    left, lasts = list(ends), asyncio.Event()

    async def work() -> None:
        if left:
            left.pop(0)()
            return
        lasts.set()
        await asyncio.Event().wait()

    return work, lasts


def breaks() -> None:
    raise ValueError("broken")


def cancelled() -> None:
    raise asyncio.CancelledError


def returns() -> None:
    return


@pytest.mark.parametrize("end", [breaks, cancelled, returns])
async def test_one_that_ends_by_itself_begins_again_and_is_counted(
    end: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched()
    work, lasts = ending(end, end)
    watched.tasks.keep("sweep", work)
    async with asyncio.timeout(PATIENCE_S):
        await lasts.wait()
    await watched.tasks.cancel()
    assert len(watched.failed) == 2
    assert all(kind.endswith("work") for kind in watched.failed)
    assert caplog.text.count("task 'sweep' has ended by itself") == 2


async def test_its_cause_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched()
    work, lasts = ending(breaks)
    watched.tasks.keep("sweep", work)
    async with asyncio.timeout(PATIENCE_S):
        await lasts.wait()
    await watched.tasks.cancel()
    assert "ValueError: broken" in caplog.text


async def test_the_process_is_whole_again_when_all_of_them_run() -> None:
    watched = Watched()
    work, _ = ending(breaks)
    watched.tasks.keep("sweep", work)
    assert watched.tasks.whole
    async with asyncio.timeout(PATIENCE_S):
        while watched.whole != [False, True]:
            watched.news.clear()
            await watched.news.wait()
    assert watched.tasks.whole
    await watched.tasks.cancel()


async def test_one_that_is_down_and_no_longer_wanted_does_not_count() -> None:
    watched = Watched()
    watched.tasks = KeptTasks(watched._failed, watched._whole, again_s=3600.0)
    work, _ = ending(breaks)
    watched.tasks.keep("link", work)
    async with asyncio.timeout(PATIENCE_S):
        await watched.news.wait()
    assert not watched.tasks.whole
    await watched.tasks.cancel("link")
    assert watched.tasks.whole
    assert watched.whole == [False, True]


async def test_a_cancelled_one_stays_ended() -> None:
    watched = Watched()
    work, lasts = ending()
    watched.tasks.keep("sweep", work)
    await lasts.wait()
    await watched.tasks.cancel()
    assert watched.failed == [] and watched.whole == []
