"""Wakes the one task that waits for a session. An asyncio.Event does as well, at several times the cost per token."""

import asyncio

__all__ = ["Bell"]


class Bell:
    """Has at most one waiter. Nobody hears a ring afterwards: look first, then wait."""

    __slots__ = ("_loop", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake whoever waits now."""
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Return when it rings next."""
        self._waiter = waiter = self._loop.create_future()
        await waiter
