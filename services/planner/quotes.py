"""From a quote of the core to the message a client reads. What the core says never happens (infinity) is 0."""

import math

from protos import planner_pb2
from services.common.clock import Clock
from services.core.quote import Quote
from services.planner.candidates import Candidate
from services.planner.promises import Promises
from services.planner.verdicts import no_state_verdict

__all__ = ["quote_for"]


def quote_for(candidate: Candidate, promises: Promises) -> planner_pb2.PlanQuoteResponse:
    """Would it fit now; if not, the tightest SLO that would, and from when on the one asked for. Reserves nothing."""
    ledger, clock = promises.ledger, promises.clock
    if not ledger.ready:
        verdict = no_state_verdict(candidate, ledger.why_not_ready, clock)
        return planner_pb2.PlanQuoteResponse(fits=False, verdict=verdict)
    found, verdict = promises.quote(candidate)
    verdict.retry_after_ms = _ms(found.earliest_s)
    return planner_pb2.PlanQuoteResponse(
        fits=found.fits,
        verdict=verdict,
        tightest_ttft_ms=_ms(found.tightest_ttft_s),
        tightest_tpot_ms=_ms(found.tightest_tpot_s),
        earliest_us=_earliest_us(found, clock),
    )


def _earliest_us(found: Quote, clock: Clock) -> int:
    return clock.now_us() + round(found.earliest_s * 1e6) if math.isfinite(found.earliest_s) else 0


def _ms(seconds: float) -> float:
    return seconds * 1000 if math.isfinite(seconds) else 0.0
