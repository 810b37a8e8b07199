"""Turns requests away before anything is done for them, where this process is behind.

Two things say so. Too many requests wait for a place already: each holds memory, and the last of them would wait
longest. Or finding a place has lately taken longer than a request's first token has: its client, who takes no best
effort, would be refused at the end of that way, after router and planner had worked for it. Both are seen from the
requests themselves, so that they hold whatever is slow: this event loop, the routers, the planners or Redis; and both
end by themselves when nobody is let in for a moment.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from protos import types_pb2
from services.admission.comebacks import Comebacks
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError

__all__ = ["Doorkeeper"]

_FRESH_S = 0.25  # so long a placement says how long the next would take
_ENOUGH = 5  # placements, before their median is believed


class Doorkeeper:
    """`most` requests may wait for their place at a time; those that wait for room at a router are not counted."""

    def __init__(self, clock: Clock, most: int) -> None:
        self._clock = clock
        self._most = most
        self._waiting = 0
        self._places: deque[tuple[float, float]] = deque()  # when it was found, how long that took
        self._turns = Comebacks(clock)

    def let_in(self, on_infeasible: types_pb2.OnInfeasible.ValueType) -> None:
        """RESOURCE_EXHAUSTED (NO_CAPACITY) where too many wait for their place already."""
        if self._waiting < self._most or on_infeasible == types_pb2.ON_INFEASIBLE_WAIT:
            return
        text = f"{self._waiting} requests wait for a place at this admission process already"
        delay_ms = self._turns.after_ms(1000 * self._waiting * self._turns.apart_s)  # they are through by then
        verdict = self._rejected(types_pb2.Constraint(detail=text), delay_ms)
        raise SloServeError(Reason.NO_CAPACITY, text, retry_after_ms=delay_ms, details=(verdict,))

    @contextmanager
    def passing(self, on_infeasible: types_pb2.OnInfeasible.ValueType) -> Iterator[None]:
        """A request on its way to its place."""
        if on_infeasible == types_pb2.ON_INFEASIBLE_WAIT:
            yield
            return
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._turns.taken()

    def check(self, queued: types_pb2.QueuedRequest, alone_s: float) -> None:
        """RESOURCE_EXHAUSTED (NO_CAPACITY) for one that would be late when it has its place.

        `alone_s`: its prefill on the fastest idle replica.
        """
        way_s = self._way_s()
        left_s = (queued.ttft_deadline_us - self._clock.now_us()) / 1e6 - way_s
        if way_s == 0.0 or left_s >= alone_s:
            return
        text = (
            f"hopeless: finding a place takes {way_s * 1000:.1f} ms, even alone the first token takes "
            f"{alone_s * 1000:.1f} ms more, its deadline leaves {left_s * 1000:.1f} ms for that"
        )
        kind = types_pb2.CONSTRAINT_KIND_HOPELESS
        constraint = types_pb2.Constraint(kind=kind, needed=alone_s, available=left_s, detail=text)
        verdict = self._rejected(constraint, way_s * 1000)
        stage = queued.stages[0]
        verdict.ttft_slo_ms, verdict.tpot_slo_ms = stage.ttft_ms, stage.tpot_ms
        raise SloServeError(Reason.NO_CAPACITY, text, retry_after_ms=way_s * 1000, details=(verdict,))

    @contextmanager
    def placing(self, on_infeasible: types_pb2.OnInfeasible.ValueType) -> Iterator[None]:
        """The call of a router: how long it takes is what the next ones reckon with, unless it is to wait there."""
        if on_infeasible == types_pb2.ON_INFEASIBLE_WAIT:
            yield
            return
        began_s = self._clock.now_s()
        try:
            yield
        finally:
            now_s = self._clock.now_s()
            self._places.append((now_s, now_s - began_s))
            self._forget(now_s)

    def _way_s(self) -> float:
        """Half of the latest placements took longer; 0 where too few are known."""
        self._forget(self._clock.now_s())
        return median(took_s for _, took_s in self._places) if len(self._places) >= _ENOUGH else 0.0

    def _forget(self, now_s: float) -> None:
        while self._places and now_s - self._places[0][0] > _FRESH_S:
            self._places.popleft()

    def _rejected(self, constraint: types_pb2.Constraint, delay_ms: float) -> types_pb2.Verdict:
        return types_pb2.Verdict(
            kind=types_pb2.VERDICT_KIND_REJECTED,
            constraint=constraint,
            decided_at_us=self._clock.now_us(),
            retry_after_ms=delay_ms,
        )
