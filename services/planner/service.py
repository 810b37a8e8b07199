"""The Planner service: can this replica promise it?"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from opentelemetry import context as otel_context

from protos import planner_pb2, planner_pb2_grpc
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.errors import FieldViolation, InvalidRequestError, Reason, SloServeError
from services.common.telemetry import record_span
from services.core.floors import AttainmentFloors
from services.core.lengths import LengthForecaster
from services.planner.candidates import Candidate, parse_candidate
from services.planner.decide import Decided, Decider
from services.planner.fleet import Fleet
from services.planner.observe import Observer
from services.planner.quotes import quote_for

__all__ = ["PlannerService"]

_MAX_CANDIDATES = 1024


class PlannerService(planner_pb2_grpc.PlannerServicer):
    """Checks what comes in, hands it to the replica's ledger and decider, and answers."""

    def __init__(
        self,
        fleet: Fleet,
        observer: Observer,
        *,
        catalogue: Catalogue,
        clock: Clock,
        lengths: LengthForecaster,
        floors: AttainmentFloors,
    ) -> None:
        self._fleet = fleet
        self._floors = floors
        self._observer = observer
        self._catalogue = catalogue
        self._tiers = catalogue.tier_list()
        self._clock = clock
        self._lengths = lengths

    async def Admit(self, request: planner_pb2.AdmitRequest, context: Any) -> planner_pb2.AdmitResponse:
        """Decide candidates for one replica."""
        started_us = self._clock.now_us()
        if not request.replica_id:
            raise InvalidRequestError(FieldViolation("replica_id", "must not be empty"))
        if len(request.candidates) > _MAX_CANDIDATES:
            raise InvalidRequestError(FieldViolation("candidates", f"at most {_MAX_CANDIDATES} at once"))
        candidates = [self._parse(wire, f"candidates[{index}]") for index, wire in enumerate(request.candidates)]
        decided = await self._decider(request.replica_id).admit(candidates)
        self._record_plan(request.replica_id, decided, started_us)
        return planner_pb2.AdmitResponse(verdicts=decided.verdicts)

    async def Commit(self, request: planner_pb2.CommitRequest, context: Any) -> planner_pb2.CommitResponse:
        """Confirm a reservation: the request is in its queue."""
        ledger = self._fleet.get(request.replica_id).ledger
        return planner_pb2.CommitResponse(committed=ledger.commit((request.request_id, request.attempt)))

    async def Release(self, request: planner_pb2.ReleaseRequest, context: Any) -> planner_pb2.ReleaseResponse:
        """Free a reservation; the worker is told where it has the request already."""
        ledger = self._fleet.get(request.replica_id).ledger
        if ledger.release((request.request_id, request.attempt)):
            self._observer.release(request.replica_id, request.request_id, request.attempt)
        return planner_pb2.ReleaseResponse()

    async def Quote(self, request: planner_pb2.PlanQuoteRequest, context: Any) -> planner_pb2.PlanQuoteResponse:
        """Would it fit, and if not, the tightest SLO that would or the earliest time."""
        promises = self._fleet.get(request.replica_id).promises
        return quote_for(self._parse(request.candidate, "candidate"), promises)

    async def Explain(self, request: planner_pb2.PlanExplainRequest, context: Any) -> planner_pb2.PlanExplainResponse:
        """The last verdict on a request, with the constraint that decided it."""
        said = self._fleet.get(request.replica_id).ledger.history.get(request.request_id)
        if said is None:
            text = f"no verdict on request {request.request_id!r} for replica {request.replica_id} is known"
            raise SloServeError(Reason.REQUEST_UNKNOWN, text)
        return planner_pb2.PlanExplainResponse(verdict=said.verdict)

    async def Observe(
        self, request_iterator: AsyncIterator[planner_pb2.ReplicaState], context: Any
    ) -> AsyncIterator[planner_pb2.Directive]:
        """A worker's states in, directives out."""
        async with aclosing(self._observer.serve(request_iterator)) as directives:
            async for directive in directives:
                yield directive

    def _parse(self, wire: planner_pb2.Candidate, field: str) -> Candidate:
        application = self._catalogue.applications.get(wire.application)
        return parse_candidate(
            wire,
            field,
            tiers=self._tiers,
            clock=self._clock,
            lengths=self._lengths,
            weight=self._floors.weight(wire.application, 1 if application is None else application.weight),
        )

    def _decider(self, replica_id: str) -> Decider:
        """The replica's decider; one without a ledger answers that it knows nothing."""
        found = self._fleet.find(replica_id)
        return self._fleet.stranger(replica_id) if found is None else found.decider

    def _record_plan(self, replica_id: str, decided: Decided, started_us: int) -> None:
        record_span(
            "plan",
            started_us,
            self._clock.now_us(),
            otel_context.get_current(),
            {
                "slos_serve.replica": replica_id,
                "slos_serve.running": decided.running,
                "slos_serve.candidates": decided.decided_together,
                "slos_serve.decision_ms": decided.decision_ms,
            },
        )
