"""How much later than planned requests reach the engine.

A plan lets a candidate's prefill start with the next batch. In truth the verdict goes back to the router, the request
through its queue and into the engine. That transit is measured on every request; where the engine's next batch is
formed before it is over, the request is not in that batch, and has to wait until the one after it can start. A first
token due soon cannot afford that, so it is reckoned with before it is promised.
"""

import math

from services.core.lag import LagEstimate

__all__ = ["TransitEstimate", "slip_s"]

_USUAL_TRANSIT_S = 0.020  # of a system that has just been started


class TransitEstimate(LagEstimate):
    """Seconds from a verdict to the arrival of its request in the engine."""

    def __init__(self) -> None:
        super().__init__(_USUAL_TRANSIT_S)


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
