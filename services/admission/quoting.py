"""Quotes: what Generate would be told, without beginning anything."""

import uuid

from protos import admission_pb2
from services.admission.arrival import Arrival
from services.admission.request_trace import RequestTrace
from services.admission.resolve import Resolver
from services.admission.routers import Routers
from services.admission.validate import CUSTOM
from services.common.errors import SloServeError

__all__ = ["Quoter"]


class Quoter:
    """Checks and resolves a request exactly as Generate does, then asks the routers about it.

    Nothing is registered in Redis, reserved at a planner, or counted as offered.
    """

    def __init__(self, resolver: Resolver, routers: Routers) -> None:
        self._resolver = resolver
        self._routers = routers

    async def quote(self, request: admission_pb2.GenerateRequest, arrival: Arrival) -> admission_pb2.QuoteResponse:
        """The fleet's best answer. Raises what Generate would raise before and while it places a request."""
        trace = RequestTrace("quote", {"slos_serve.application": request.application or CUSTOM})
        try:
            with trace.active():
                checked = await self._resolver.check(request, arrival, trace)
                # An id of its own: the planner must not take the quote for a request that it knows.
                queued = self._resolver.resolve(checked, uuid.uuid4().hex, arrival, trace)
                found = await self._routers.quote(queued, arrival.remaining_s)
        except SloServeError as error:
            trace.end({}, error.text)
            raise
        trace.end({"slos_serve.fits": found.fits})
        engine_ms = (queued.ttft_deadline_us - queued.arrival_us) / 1000
        lag_ms = max(0.0, queued.stages[0].ttft_ms - engine_ms)  # the way from engine to client comes on top
        return admission_pb2.QuoteResponse(
            fits=found.fits,
            verdict=found.verdict,
            tightest_ttft_ms=found.tightest_ttft_ms + lag_ms if found.tightest_ttft_ms > 0 else 0.0,
            tightest_tpot_ms=found.tightest_tpot_ms,
            earliest_us=found.earliest_us,
        )
