"""One round of offers: replicas are asked one after the other until one promises, or holds the request in its plan."""

import logging
import math
import time
from collections.abc import Sequence

from opentelemetry import trace

from protos import planner_pb2, router_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import InvalidRequestError, SloServeError
from services.common.instruments import RouterInstruments
from services.router.planners import Planners
from services.router.verdicts import no_planner, verdict_word

__all__ = ["Offers", "held", "taker"]

_log = logging.getLogger(__name__)


def taker(hops: Sequence[router_pb2.Hop]) -> router_pb2.Hop | None:
    """The replica that gets the request; None where each declined.

    The first that promises. Else one where it may wait for its verdict: the first whose plan holds it for now, else the
    one that expects its first token soonest.
    """
    for hop in hops:
        if hop.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED:
            return hop
    waits = [hop for hop in hops if hop.verdict.kind == types_pb2.VERDICT_KIND_PENDING]
    return min(waits, key=_lateness, default=None)


def held(verdict: types_pb2.Verdict) -> bool:
    """Whether the replica's plan has room for the request now, promised or not."""
    if verdict.kind == types_pb2.VERDICT_KIND_PENDING:
        return not verdict.HasField("constraint")
    return verdict.kind == types_pb2.VERDICT_KIND_ADMITTED


def _lateness(hop: router_pb2.Hop) -> float:
    return 0.0 if held(hop.verdict) else hop.verdict.predicted_ttft_ms or math.inf


class Offers:
    """Asks planners, one span per hop."""

    def __init__(self, planners: Planners, clock: Clock, instruments: RouterInstruments) -> None:
        self._planners = planners
        self._clock = clock
        self._instruments = instruments
        self._tracer = trace.get_tracer("slos_serve")

    async def round(
        self, candidate: planner_pb2.Candidate, stage: types_pb2.Stage, order: Sequence[str]
    ) -> list[router_pb2.Hop]:
        """What each replica's planner said, in order, up to the first whose plan holds the request.

        A planner that does not answer is asked once per round, not once for each of its replicas. Raises
        InvalidRequestError where a planner finds the candidate malformed.
        """
        hops: list[router_pb2.Hop] = []
        silent: dict[str, str] = {}
        for replica_id in order:
            hop = await self._hop(replica_id, candidate, stage, silent)
            hops.append(hop)
            if held(hop.verdict):
                break
        return hops

    async def _hop(
        self, replica_id: str, candidate: planner_pb2.Candidate, stage: types_pb2.Stage, silent: dict[str, str]
    ) -> router_pb2.Hop:
        address = self._planners.address_of(replica_id)
        started_s = time.perf_counter()
        with self._tracer.start_as_current_span(f"hop {replica_id}", record_exception=False) as span:
            if address in silent:
                verdict = no_planner(stage, silent[address], self._clock.now_us())
            else:
                verdict = await self._ask(replica_id, address, candidate, stage, silent)
            span.set_attributes(
                {
                    "slos_serve.replica": replica_id,
                    "slos_serve.verdict": verdict_word(verdict),
                    "slos_serve.predicted_ttft_ms": verdict.predicted_ttft_ms,
                    "slos_serve.constraint": verdict.constraint.detail,
                }
            )
        plan_ms = (time.perf_counter() - started_s) * 1000
        self._instruments.hops.add(1, {"slos_serve.verdict": verdict_word(verdict), "slos_serve.replica": replica_id})
        return router_pb2.Hop(replica_id=replica_id, verdict=verdict, plan_ms=plan_ms)

    async def _ask(
        self,
        replica_id: str,
        address: str,
        candidate: planner_pb2.Candidate,
        stage: types_pb2.Stage,
        silent: dict[str, str],
    ) -> types_pb2.Verdict:
        try:
            return await self._planners.admit(replica_id, candidate)
        except InvalidRequestError:
            raise
        except SloServeError as error:
            _log.warning("planner %s gave no verdict on %s: %s", address, replica_id, error)
            silent[address] = f"planner of {replica_id} gave no verdict: {error.text}"
            return no_planner(stage, silent[address], self._clock.now_us())
