"""How much best effort a replica takes on while promises compete for it.

What is left over is not free: a best-effort token in a batch makes every decode in it later, and a request that decodes
later holds its KV blocks longer. While everything that asks for a promise gets one, that costs nobody anything. After a
conflict (a request was set aside or declined) the replica is *pressed* for a while, and best effort joins only every
so-manieth batch: enough never to starve, too little to cost promises.
"""

import math

__all__ = ["BestEffortPace"]


class BestEffortPace:
    """Says before every batch whether best effort may join it.

    pressed_s: how long a replica stays pressed after a conflict. every: while pressed, best effort joins one batch in
    this many.
    """

    def __init__(self, *, pressed_s: float = 5.0, every: int = 16) -> None:
        self._pressed_s = pressed_s
        self._every = every
        self._conflict_s = -math.inf
        self._batches = 0

    def conflict(self, now_s: float) -> None:
        """Somebody who asked for a promise could not be given one."""
        self._conflict_s = now_s

    def pressed(self, now_s: float) -> bool:
        """Whether there was a conflict of late."""
        return now_s - self._conflict_s < self._pressed_s

    def joins(self, now_s: float) -> bool:
        """Whether best effort may join the batch formed now; asked once a batch."""
        if not self.pressed(now_s):
            self._batches = 0
            return True
        self._batches += 1
        return self._batches % self._every == 0
