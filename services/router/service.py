"""The Router service."""

import time
from collections.abc import Awaitable
from typing import Any

from opentelemetry import trace

from protos import router_pb2, router_pb2_grpc, types_pb2
from services.common.config import Catalogue
from services.common.errors import SloServeError
from services.common.instruments import RouterInstruments
from services.common.telemetry import TraceContext, context_from
from services.router.fleet import Fleet
from services.router.place import Placer
from services.router.rescue import Rescuer
from services.router.survey import Survey
from services.router.tally import Tally
from services.router.validate import check_explain, check_place, check_quote, check_replace
from services.router.verdicts import verdict_word

__all__ = ["RouterService"]


class RouterService(router_pb2_grpc.RouterServicer):
    """Checks what comes in, hands it on, and measures the outcome."""

    def __init__(
        self,
        *,
        placer: Placer,
        rescuer: Rescuer,
        survey: Survey,
        fleet: Fleet,
        tally: Tally,
        catalogue: Catalogue,
        instruments: RouterInstruments,
    ) -> None:
        self._placer = placer
        self._rescuer = rescuer
        self._survey = survey
        self._fleet = fleet
        self._tally = tally
        self._tiers = [tier.name for tier in catalogue.tier_list()]
        self._instruments = instruments
        self._tracer = trace.get_tracer("slos_serve")

    async def Place(self, request: router_pb2.PlaceRequest, context: Any) -> router_pb2.PlaceResponse:
        """Choose a replica and append the request to its queue."""
        check_place(request, self._tiers)
        queued = types_pb2.QueuedRequest()
        queued.CopyFrom(request.request)
        placing = self._placer.place(queued, request.on_infeasible, request.previous_request_id)
        try:
            response = await self._measured("place", queued, placing)
        except SloServeError as error:
            self._tally.refused(error)
            raise
        self._tally.placed(response.verdict)
        return response

    async def Replace(self, request: router_pb2.ReplaceRequest, context: Any) -> router_pb2.PlaceResponse:
        """Place a request again whose replica was lost."""
        check_replace(request)
        named = types_pb2.QueuedRequest(request_id=request.request_id, attempt=request.attempt + 1)
        return await self._measured("replace", named, self._rescuer.replace(request))

    async def ListReplicas(
        self, request: router_pb2.ListReplicasRequest, context: Any
    ) -> router_pb2.ListReplicasResponse:
        """The live replicas as of a moment ago."""
        return router_pb2.ListReplicasResponse(replicas=self._fleet.replicas)

    async def Quote(self, request: router_pb2.RouterQuoteRequest, context: Any) -> router_pb2.RouterQuoteResponse:
        """Would it fit anywhere now; the best answer over the fleet."""
        check_quote(request, self._tiers)
        return await self._survey.quote(request.request)

    async def Explain(self, request: router_pb2.RouterExplainRequest, context: Any) -> router_pb2.RouterExplainResponse:
        """What the planners last said about a request."""
        check_explain(request)
        return await self._survey.explain(request.request_id)

    async def _measured(
        self, kind: str, request: types_pb2.QueuedRequest, placing: Awaitable[router_pb2.PlaceResponse]
    ) -> router_pb2.PlaceResponse:
        """Await a placement inside its `route` span and count how it went."""
        parent = None
        if not trace.get_current_span().get_span_context().is_valid:
            parent = context_from(TraceContext(request.traceparent, request.tracestate))
        attributes = {"slos_serve.placement": kind, "slos_serve.application": request.application}
        outcome, started_s = "cancelled", time.perf_counter()
        with self._tracer.start_as_current_span("route", context=parent, record_exception=False) as span:
            span.set_attributes({"slos_serve.request_id": request.request_id, "slos_serve.attempt": request.attempt})
            try:
                response = await placing
                outcome = verdict_word(response.verdict)
                span.set_attributes(
                    {
                        "slos_serve.verdict": outcome,
                        "slos_serve.replica": response.replica_id,
                        "slos_serve.hops": response.verdict.hops,
                        "slos_serve.queue": response.stream,
                    }
                )
                return response
            except SloServeError as error:
                outcome = error.reason.value
                raise
            finally:
                self._instruments.placements.add(1, {**attributes, "slos_serve.outcome": outcome})
                self._instruments.placement_duration_s.record(time.perf_counter() - started_s, attributes)
