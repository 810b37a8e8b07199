"""How long a first token takes from the end of its batch to the client's stream.

A plan ends batches at deadlines, and a promise is about what the client is sent. The way between (engine, worker, this
process) is measured on every first token and taken off the first-token deadlines of the requests to come.
"""

from services.common.clock import Clock
from services.common.instruments import AdmissionInstruments
from services.core.lag import LagEstimate

__all__ = ["DeliveryLag"]

_LARGEST_SHARE = 0.25  # of a TTFT: a way that takes longer cannot be made up for by hurrying the engine


class DeliveryLag:
    """The delivery lag of this process, over all replicas."""

    def __init__(self, clock: Clock, instruments: AdmissionInstruments) -> None:
        self._clock = clock
        self._histogram = instruments.delivery_lag_s
        self._estimate = LagEstimate()

    def first_token(self, replica_id: str, emitted_us: int, sent_us: int) -> None:
        """A first token whose batch ended at `emitted_us` by our clock was sent at `sent_us`."""
        lag_s = max(0.0, (sent_us - emitted_us) / 1e6)
        self._estimate.observe(self._clock.now_s(), lag_s)
        self._histogram.record(lag_s, {"slos_serve.replica": replica_id})

    def off_s(self, ttft_s: float) -> float:
        """Seconds to take off a first-token deadline that is `ttft_s` after the arrival."""
        return min(self._estimate.seconds(self._clock.now_s()), _LARGEST_SHARE * ttft_s)
