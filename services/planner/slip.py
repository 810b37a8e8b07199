"""How much later than planned requests reach the engine.

A plan lets a candidate's prefill start with the next batch. In truth the verdict goes back to the router, the request
through its queue and into the engine, and by then a batch or two may have left. That slip is measured on every promise
and taken off the first-token deadlines of those to come.
"""

import math
from collections import deque

__all__ = ["SlipEstimate"]

_QUANTILE = 0.9
_REMEMBERED = 64
_FRESH_S = 30.0


class SlipEstimate:
    """An upper quantile of recent slips, seconds. Old ones are forgotten, so that one bad minute does not last."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def observe(self, now_s: float, slip_s: float) -> None:
        """A promised request reached the engine `slip_s` after its planned start (not below 0)."""
        self._seen.append((now_s, max(0.0, slip_s)))

    def seconds(self, now_s: float) -> float:
        """What to reckon with; 0 while nothing recent is known."""
        while self._seen and now_s - self._seen[0][0] > _FRESH_S:
            self._seen.popleft()
        if not self._seen:
            return 0.0
        slips = sorted(slip_s for _, slip_s in self._seen)
        return slips[math.ceil(_QUANTILE * len(slips)) - 1]
