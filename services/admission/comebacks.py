"""When those turned away come back: not all at once, and no faster than requests are being taken.

The delay that a plan gives says when one request would fit if nothing else came. To many that are turned away together
it says the same, and all but a few of them would be turned away again. So each is given a turn of its own on top:
turns are as far apart as requests were taken lately. Every admission process paces its own clients by what it was
given itself, so several of them together ask for no more than the fleet takes. How far ahead turns are given follows
the share that is refused.
"""

import random
from collections import deque

from google.protobuf import any_pb2, message

from protos import types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError

__all__ = ["Comebacks"]

_LOOK_BACK_S = 2.0  # over which the rate is measured: a flood changes it within that
_WIDEST_S = 0.25  # between two turns, where next to nothing was taken: a few tries per second find out what changed
_LONGEST_S = 30.0  # a client that is told more will not come back
_UNKNOWN_MS = 1000.0  # where no plan says when there would be room


class Comebacks:
    """Gives turns. `taken` is called for everything that got what those turned away wanted."""

    def __init__(self, clock: Clock, draw: random.Random | None = None) -> None:
        self._clock = clock
        self._draw = draw or random.Random()
        self._taken_s: deque[float] = deque()
        self._refused_s: deque[float] = deque()
        self._next_s = 0.0

    def taken(self) -> None:
        """A request was taken."""
        self._taken_s.append(self._clock.now_s())
        self._forget()

    def after_ms(self, plan_ms: float | None = None) -> float:
        """The delay to tell one client, milliseconds. `plan_ms`: when the plan has room; None or 0 where unknown."""
        now_s = self._clock.now_s()
        self._refused_s.append(now_s)
        turn_s, reach_s = max(0.0, self._next_s - now_s), self._reach_s()
        if turn_s < reach_s or not turn_s:
            self._next_s = now_s + turn_s + self.apart_s
        else:  # all turns within reach are given: wherever in the later half of them
            self._next_s = now_s + reach_s
            turn_s = self._draw.uniform(reach_s / 2, reach_s)
        return (plan_ms or _UNKNOWN_MS) + 1000 * turn_s

    def pace(self, error: SloServeError) -> None:
        """Give a client whose request found no room its turn, in the error and in the verdict that goes with it."""
        if error.reason is not Reason.NO_CAPACITY:
            return
        error.retry_after_ms = self.after_ms(error.retry_after_ms)
        error.details = tuple(_delayed(detail, error.retry_after_ms) for detail in error.details)

    @property
    def apart_s(self) -> float:
        """Seconds from one turn to the next."""
        self._forget()
        return min(_WIDEST_S, _LOOK_BACK_S / max(1, len(self._taken_s)))

    def _reach_s(self) -> float:
        """The longest wait for a turn: the fewer are refused, the sooner there is room again for who comes back."""
        self._forget()
        refused = len(self._refused_s)
        return _LONGEST_S * refused / (refused + len(self._taken_s))

    def _forget(self) -> None:
        since_s = self._clock.now_s() - _LOOK_BACK_S
        for seen_s in (self._taken_s, self._refused_s):
            while seen_s and seen_s[0] < since_s:
                seen_s.popleft()


def _delayed(detail: message.Message, delay_ms: float) -> message.Message:
    if isinstance(detail, any_pb2.Any):  # from a router
        packed, detail = detail, types_pb2.Verdict()
        if not packed.Unpack(detail):
            return packed
    if isinstance(detail, types_pb2.Verdict):
        detail.retry_after_ms = delay_ms
    return detail
