"""The limit on a batch's duration while promises are being made.

A request that arrives while a batch runs waits for its end, and for that of every other batch in flight. So the cap
follows the tightest TTFT promised of late, divided by the batches in flight; but a batch that is mostly its fixed cost
b helps nobody, so it does not fall below four times b (0.1 s on OPT-6.7B, 0.15 s on OPT-30B). When no promise was made
for a while, nobody is kept waiting and the cap lapses.
"""

from collections import deque

from services.core.perf_model import BatchShape, PerfModel

__all__ = ["CAP_STEPS", "DurationCap", "caps_around"]

CAP_STEPS = (1.0, 1.4, 2.0)
"""The default cap and those tried on conflict, relative to the default."""

_FIXED_COSTS = 4.0
_LONGEST_S = 0.200
_LONGEST_SEARCHED_S = 0.260


def caps_around(cap_s: float) -> tuple[float, ...]:
    """The caps for `PlanSettings.caps_s`: the default first, then those tried on conflict."""
    searched_s = max(cap_s, _LONGEST_SEARCHED_S)
    return tuple(sorted({min(cap_s * step, searched_s) for step in CAP_STEPS}))


class DurationCap:
    """Remembers the TTFTs promised in the last `window_s`; lapses `lapse_s` after the last promise."""

    def __init__(self, *, window_s: float = 30.0, lapse_s: float = 5.0, default_ttft_s: float = 0.100) -> None:
        self._window_s = window_s
        self._lapse_s = lapse_s
        self._default_ttft_s = default_ttft_s
        self._promises: deque[tuple[float, float]] = deque()

    def promised(self, now_s: float, ttft_s: float) -> None:
        """A first token within `ttft_s` of arrival was asked for at `now_s`."""
        # Kept ascending in TTFT: a looser promise made earlier can never again be the tightest in the window.
        while self._promises and self._promises[-1][1] >= ttft_s:
            self._promises.pop()
        self._promises.append((now_s, ttft_s))

    def lapsed(self, now_s: float) -> bool:
        """Whether no promise was made recently; the latest promise is always the last one kept."""
        return not self._promises or now_s - self._promises[-1][0] > self._lapse_s

    def caps_s(self, now_s: float, model: PerfModel, batches_in_flight: int = 1) -> tuple[float, ...]:
        """The caps for `PlanSettings.caps_s`, the default first."""
        while self._promises and now_s - self._promises[0][0] > self._window_s:
            self._promises.popleft()
        tightest_s = self._promises[0][1] if self._promises else self._default_ttft_s
        fixed_s = model.seconds(BatchShape(0))
        cap_s = max(tightest_s / max(1, batches_in_flight), _FIXED_COSTS * fixed_s)
        return caps_around(min(cap_s, max(_LONGEST_S, _FIXED_COSTS * fixed_s)))
