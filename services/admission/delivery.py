"""How long tokens take from the end of their batch to the client's stream.

A plan ends batches at deadlines, and a promise is about what the client is sent. The way between (engine, worker, this
process) is measured on every first token and taken off the first-token deadlines of the requests to come. How much
longer it took for a last token than for the first of the same request is measured too: the engine keeps that much of
every decode deadline in hand.
"""

from services.common.clock import Clock
from services.common.instruments import AdmissionInstruments
from services.core.lag import LagEstimate

__all__ = ["USUAL_LAG_S", "DeliveryLag"]

USUAL_LAG_S = 0.005  # until some are measured
_USUAL_SPREAD_S = 0.003
_SPREAD_QUANTILE = 0.99  # batches end at decode deadlines all the time, so that few misses of it are many promises
_SPREAD_HEADROOM = 1.5  # the tail is long, and milliseconds off the last of many tokens cost next to nothing
_LARGEST_SHARE = 0.25  # of an SLO: a way that takes longer cannot be made up for by hurrying the engine


class DeliveryLag:
    """The delivery lag of this process and its spread, over all replicas."""

    def __init__(self, clock: Clock, instruments: AdmissionInstruments) -> None:
        self._clock = clock
        self._histogram = instruments.delivery_lag_s
        self._first = LagEstimate(USUAL_LAG_S, alert=True)
        self._spread = LagEstimate(_USUAL_SPREAD_S, _SPREAD_QUANTILE)

    def first_token(self, replica_id: str, lag_s: float) -> None:
        """A first token was sent `lag_s` after the end of its batch."""
        self._first.observe(self._clock.now_s(), lag_s)
        self._histogram.record(max(0.0, lag_s), {"slos_serve.replica": replica_id})

    def last_token(self, first_lag_s: float, lag_s: float) -> None:
        """A last token was sent `lag_s` after the end of its batch, the first of the same request `first_lag_s`."""
        self._spread.observe(self._clock.now_s(), lag_s - first_lag_s)

    def spread_s(self, tpot_s: float) -> float:
        """Seconds to keep in hand of every decode deadline of a request whose tightest TPOT is `tpot_s`."""
        return min(_SPREAD_HEADROOM * self._spread.seconds(self._clock.now_s()), _LARGEST_SHARE * tpot_s)

    def off_s(self, ttft_s: float) -> float:
        """Seconds to take off a first-token deadline that is `ttft_s` after the arrival."""
        return min(self._first.seconds(self._clock.now_s()), _LARGEST_SHARE * ttft_s)
