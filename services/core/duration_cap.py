"""The limit on a batch's duration while promises are being made.

A request that arrives while a batch runs waits for its end, and for that of every other batch in flight. What it can
wait is its patience: its TTFT less the time its own prefill takes. Where a batch lasts d and d exceeds the patience w,
1 - w / d of those that arrive are hopeless on arrival, however idle the replica is. So the cap follows a low quantile
of the patience of those that asked of late, divided by the batches in flight. A short batch is mostly its fixed cost b,
which everybody pays: the cap does not fall below 2.5 b (62 ms on OPT-6.7B), and beyond 0.2 s, or 4 b on slower models,
there is hardly anything left to win. When no promise was made for a while, nobody is kept waiting and the cap lapses.
"""

import math
from bisect import bisect_left, insort
from collections import deque

from services.core.perf_model import BatchShape, PerfModel

__all__ = ["CAP_STEPS", "DurationCap", "caps_around"]

CAP_STEPS = (1.0, 1.4, 2.0)
"""The default cap and those tried on conflict, relative to the default."""

_FEWEST_FIXED_COSTS = 2.5
_USUAL_S, _USUAL_FIXED_COSTS = 0.100, 4.0  # as long as nobody has asked: the longer of the two
_LONGEST_S = 0.200
_LONGEST_SEARCHED_S = 0.260
_GRAIN = 0.25  # of a fixed cost: smaller changes are not worth telling an engine
_QUANTILE = 0.1
_MOST_ASKED = 256


def caps_around(cap_s: float) -> tuple[float, ...]:
    """The caps for `PlanSettings.caps_s`: the default first, then those tried on conflict."""
    searched_s = max(cap_s, _LONGEST_SEARCHED_S)
    return tuple(sorted({min(cap_s * step, searched_s) for step in CAP_STEPS}))


class DurationCap:
    """Remembers what was asked in the last `window_s`; lapses `lapse_s` after the last promise."""

    def __init__(self, *, window_s: float = 30.0, lapse_s: float = 5.0) -> None:
        self._window_s = window_s
        self._lapse_s = lapse_s
        self._promised_s = -math.inf
        self._asked: deque[tuple[float, float]] = deque()  # when, patience
        self._ascending: list[float] = []

    def asked(self, now_s: float, patience_s: float) -> None:
        """Somebody asked for a first token so soon that it could wait `patience_s` before its prefill begins."""
        self._asked.append((now_s, patience_s))
        insort(self._ascending, patience_s)
        self._forget(now_s)

    def promised(self, now_s: float) -> None:
        """Somebody was promised a first token, or would have been but for long batches."""
        self._promised_s = now_s

    def lapsed(self, now_s: float) -> bool:
        """Whether no promise was made recently."""
        return now_s - self._promised_s > self._lapse_s

    def caps_s(self, now_s: float, model: PerfModel, batches_in_flight: int = 1) -> tuple[float, ...]:
        """The caps for `PlanSettings.caps_s`, the default first."""
        self._forget(now_s)
        fixed_s = model.seconds(BatchShape(0))
        if not self._ascending:
            return caps_around(max(_USUAL_S, _USUAL_FIXED_COSTS * fixed_s))
        patience_s = self._ascending[int(_QUANTILE * len(self._ascending))] / max(1, batches_in_flight)
        costs = math.floor(patience_s / (_GRAIN * fixed_s)) * _GRAIN
        longest_s = max(_LONGEST_S, _USUAL_FIXED_COSTS * fixed_s)
        return caps_around(min(max(costs, _FEWEST_FIXED_COSTS) * fixed_s, longest_s))

    def _forget(self, now_s: float) -> None:
        while self._asked and (len(self._asked) > _MOST_ASKED or now_s - self._asked[0][0] > self._window_s):
            _, patience_s = self._asked.popleft()
            del self._ascending[bisect_left(self._ascending, patience_s)]
