"""A first token on its way out that may wait: the output of a promised request until its deadline, or a word before it.

The scheduler plans decode deadlines from when the first token leaves (docs/hook.md). What the engine produces meanwhile
waits too, in order, and leaves with it.
"""

import asyncio
from collections.abc import Callable

from services.common.clock import Clock
from services.worker.engine_api import EngineOutput

__all__ = ["FirstTokenHold"]


class FirstTokenHold:
    """Holds one request's output once. `deliver` takes what leaves, its time being when it leaves."""

    def __init__(self, deadline_s: float, clock: Clock, deliver: Callable[[EngineOutput], None]) -> None:
        self._deadline_s = deadline_s
        self._clock = clock
        self._deliver = deliver
        self._held: list[EngineOutput] = []
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def keep(self, output: EngineOutput) -> bool:
        """Hold an output; False where it leaves at once. The end of a request takes what is held along."""
        left_s = self._deadline_s - self._clock.now_s()
        if self._over or left_s <= 0 or output.end is not None:
            self.release()
            return False
        self._held.append(output)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self.release)
        return True

    def cancel(self) -> None:
        """Forget what is held: nobody may have it any more."""
        self._held.clear()
        self.release()

    def release(self) -> None:
        """Let go what is held, and hold nothing any more."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held:
            token_ids = tuple(token_id for output in self._held for token_id in output.token_ids)
            request_id = self._held[0].request_id
            self._held.clear()
            self._deliver(EngineOutput(request_id, token_ids, self._clock.now_s()))
