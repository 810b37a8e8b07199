"""How late something tends to be: an upper quantile of what was seen lately."""

import math
from collections import deque

__all__ = ["LagEstimate"]

_REMEMBERED = 256
_FRESH_S = 30.0
_ENOUGH = 16


class LagEstimate:
    """An upper quantile of recent lags, seconds. Old ones are forgotten, so that one bad minute does not last.

    `prior_s` is reckoned with at least until enough is known; `quantile` of those to come should stay below.
    """

    def __init__(self, prior_s: float = 0.0, quantile: float = 0.97) -> None:
        self._prior_s = prior_s
        self._quantile = quantile
        self._seen: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def observe(self, now_s: float, lag_s: float) -> None:
        """Something came `lag_s` later than it was reckoned with (not below 0)."""
        self._seen.append((now_s, max(0.0, lag_s)))

    def forget(self) -> None:
        """Nothing seen so far counts any more."""
        self._seen.clear()

    def seconds(self, now_s: float) -> float:
        """What to reckon with. Among few, the largest is left out as an accident."""
        while self._seen and now_s - self._seen[0][0] > _FRESH_S:
            self._seen.popleft()
        if not self._seen:
            return self._prior_s
        lags = sorted(lag_s for _, lag_s in self._seen)
        found_s = lags[math.floor(self._quantile * (len(lags) - 1))]
        return found_s if len(lags) >= _ENOUGH else max(found_s, self._prior_s)
