"""How late something tends to be: an upper quantile of what was seen lately."""

import math
from collections import deque
from itertools import islice
from statistics import median

__all__ = ["LagEstimate"]

_REMEMBERED = 256
_FRESH_S = 30.0
_ENOUGH = 16
_LATEST, _LATEST_S = 8, 1.0  # so many, within so long


class LagEstimate:
    """An upper quantile of recent lags, seconds. Old ones are forgotten, so that one bad minute does not last.

    `prior_s` is reckoned with at least until enough is known; `quantile` of those to come should stay below. Where
    `alert`, the second largest of the latest few counts as well: among hundreds the quantile moves only after many.
    """

    def __init__(self, prior_s: float = 0.0, quantile: float = 0.97, *, alert: bool = False) -> None:
        self._prior_s = prior_s
        self._quantile = quantile
        self._alert = alert
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
        found_s = max(lags[math.floor(self._quantile * (len(lags) - 1))], self._latest_s(now_s))
        return found_s if len(lags) >= _ENOUGH else max(found_s, self._prior_s)

    def median_s(self, now_s: float) -> float:
        """What half of the recent ones stayed below; `prior_s` where there are none."""
        recent = [lag_s for seen_s, lag_s in self._seen if now_s - seen_s <= _FRESH_S]
        return median(recent) if recent else self._prior_s

    def _latest_s(self, now_s: float) -> float:
        if not self._alert:
            return 0.0
        latest = islice(reversed(self._seen), _LATEST)
        lags = sorted(lag_s for seen_s, lag_s in latest if now_s - seen_s <= _LATEST_S)
        return lags[-2] if len(lags) > 1 else 0.0
