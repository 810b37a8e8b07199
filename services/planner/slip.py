"""How much later than planned requests reach the engine.

A plan lets a candidate's prefill start with the next batch. In truth the verdict goes back to the router, the request
through its queue and into the engine. That transit is measured on every request; where the engine's next batch is
formed before it is over, the request is not in that batch, and has to wait until the one after it can start. A first
token due soon cannot afford that, so it is reckoned with before it is promised.
"""

import math
from dataclasses import dataclass

from services.core.lag import LagEstimate

__all__ = ["USUAL_TRANSIT_S", "Slips", "TransitEstimate", "slip_s"]

USUAL_TRANSIT_S = 0.020
"""Of a system that has just been started."""

_BELIEVED_S = 1.0
_HALVES_S = 1.0


class TransitEstimate(LagEstimate):
    """Seconds from a verdict to the arrival of its request in the engine.

    Only what is sent on its way tells how long that is. An estimate that turns everybody away is therefore in doubt:
    where nothing has arrived for a second since it did, it falls back towards the usual, and what arrives next counts
    alone.
    """

    def __init__(self) -> None:
        super().__init__(USUAL_TRANSIT_S, alert=True)
        self._doubted_s = math.inf  # from when on

    def turned_away(self, now_s: float) -> None:
        """Somebody was turned away because of it."""
        self._doubted_s = min(self._doubted_s, now_s + _BELIEVED_S)

    def observe(self, now_s: float, lag_s: float) -> None:
        """A request arrived `lag_s` after its verdict."""
        if now_s > self._doubted_s:
            self.forget()
        self._doubted_s = math.inf
        super().observe(now_s, lag_s)

    def median_s(self, now_s: float) -> float:
        """What half of the recent ones stayed below, and no more than is reckoned with."""
        return min(super().median_s(now_s), self.seconds(now_s))

    def seconds(self, now_s: float) -> float:
        """What to reckon with."""
        known_s = super().seconds(now_s)
        doubted_s = now_s - self._doubted_s
        if doubted_s <= 0 or known_s <= USUAL_TRANSIT_S:
            return known_s
        return USUAL_TRANSIT_S + (known_s - USUAL_TRANSIT_S) * math.pow(0.5, doubted_s / _HALVES_S)


@dataclass(frozen=True, slots=True)
class Slips:
    """How much later than planned the prefill of a candidate starts, seconds.

    Hardly ever later than `safe_s`; as likely as not `likely_s`; `usual_s` where its way takes no longer than on a
    system that has just been started. It may always be one batch later, the next of which lasts `batch_s`.
    """

    safe_s: float = 0.0
    likely_s: float = 0.0
    usual_s: float = 0.0
    batch_s: float = 0.0


def slip_s(now_s: float, free_s: float, transit_s: float, batch_s: float, batches_in_flight: int = 1) -> float:
    """How much later than at max(`now_s`, `free_s`) the prefill of a candidate decided at `now_s` can start.

    The batches in flight end at `free_s`; one that is formed before the candidate has arrived runs without it, for
    `batch_s`. With n in flight the next is formed n - 1 batches before `free_s`.
    """
    if not math.isfinite(free_s):
        return transit_s
    start_s = max(now_s, free_s)
    formed_s = free_s - (batches_in_flight - 1) * batch_s
    missed = max(0, math.ceil((now_s + transit_s - formed_s) / batch_s))
    return max(0.0, free_s + missed * batch_s - start_s)
