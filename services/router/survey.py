"""Asking all replicas at once, without placing anything: quotes and explanations.

One planner's answer is about one replica. What the client hears is the best over the fleet: the replica that fits
with the earliest first token, else the one that comes closest, and the best of each number.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence

from protos import planner_pb2, router_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import InvalidRequestError, Reason, SloServeError
from services.router.candidate import candidate_of, current_stage, output_tokens
from services.router.fleet import Fleet
from services.router.planners import Planners
from services.router.verdicts import DEFAULT_RETRY_MS, nearest, no_planner, no_replica

__all__ = ["Survey", "best_quote"]

_log = logging.getLogger(__name__)

Answer = tuple[router_pb2.Hop, planner_pb2.PlanQuoteResponse | None]


class Survey:
    """Asks the planners of all live replicas concurrently. Nothing is reserved, counted or stored."""

    def __init__(self, fleet: Fleet, planners: Planners, clock: Clock) -> None:
        self._fleet = fleet
        self._planners = planners
        self._clock = clock

    async def quote(self, request: types_pb2.QueuedRequest) -> router_pb2.RouterQuoteResponse:
        """The best answer of the replicas that could be asked to take the request.

        Raises SloServeError: NO_REPLICA, PLANNER_UNAVAILABLE where no planner answered; InvalidRequestError where the
        request is too long for every replica.
        """
        order = self._fleet.order(request, output_tokens(request))
        if not order:
            raise no_replica()
        candidate, stage = candidate_of(request), current_stage(request)
        answers = await asyncio.gather(*(self._quote(replica_id, candidate, stage) for replica_id in order))
        hops = [hop for hop, _ in answers]
        quotes = [quote for _, quote in answers if quote is not None]
        if not quotes:
            raise _unanswered(hop.verdict.constraint.detail for hop in hops)
        return best_quote(hops, quotes)

    async def explain(self, request_id: str) -> router_pb2.RouterExplainResponse:
        """What each live replica's planner last said about a request, in the order in which it was said.

        Raises SloServeError: NO_REPLICA, PLANNER_UNAVAILABLE where no planner answered.
        """
        replica_ids = [replica.replica_id for replica in self._fleet.replicas]
        if not replica_ids:
            raise no_replica()
        asked = (self._planners.explain(replica_id, request_id) for replica_id in replica_ids)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        hops: list[router_pb2.Hop] = []
        failures: list[SloServeError] = []
        for replica_id, answer in zip(replica_ids, answers, strict=True):
            if isinstance(answer, SloServeError):
                failures.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            elif answer is not None:
                hops.append(router_pb2.Hop(replica_id=replica_id, verdict=answer))
        if len(failures) == len(replica_ids):
            raise _unanswered(failure.text for failure in failures)
        hops.sort(key=lambda hop: hop.verdict.decided_at_us)
        return router_pb2.RouterExplainResponse(hops=hops)

    async def _quote(self, replica_id: str, candidate: planner_pb2.Candidate, stage: types_pb2.Stage) -> Answer:
        started_s = time.perf_counter()
        quote: planner_pb2.PlanQuoteResponse | None = None
        try:
            quote = await self._planners.quote(replica_id, candidate)
            verdict = quote.verdict
        except InvalidRequestError:
            raise
        except SloServeError as error:
            _log.warning("planner of %s gave no quote: %s", replica_id, error)
            verdict = no_planner(stage, f"planner of {replica_id} gave no quote: {error.text}", self._clock.now_us())
        plan_ms = (time.perf_counter() - started_s) * 1000
        return router_pb2.Hop(replica_id=replica_id, verdict=verdict, plan_ms=plan_ms), quote


def best_quote(
    hops: Sequence[router_pb2.Hop], quotes: Sequence[planner_pb2.PlanQuoteResponse]
) -> router_pb2.RouterQuoteResponse:
    """The fleet's answer out of each replica's. `hops` are all that were asked, `quotes` those that answered."""
    fitting = [quote.verdict for quote in quotes if quote.fits]
    chosen = min(fitting, key=lambda verdict: verdict.predicted_ttft_ms) if fitting else nearest(hops)
    response = router_pb2.RouterQuoteResponse(
        fits=bool(fitting),
        verdict=chosen,
        tightest_ttft_ms=min((quote.tightest_ttft_ms for quote in quotes if quote.tightest_ttft_ms > 0), default=0.0),
        tightest_tpot_ms=min((quote.tightest_tpot_ms for quote in quotes if quote.tightest_tpot_ms > 0), default=0.0),
        earliest_us=min((quote.earliest_us for quote in quotes if quote.earliest_us > 0), default=0),
        hops=hops,
    )
    response.verdict.hops = len(hops)
    return response


def _unanswered(reasons: Iterable[str]) -> SloServeError:
    text = "; ".join(dict.fromkeys(reasons))
    return SloServeError(Reason.PLANNER_UNAVAILABLE, text, retry_after_ms=DEFAULT_RETRY_MS)
