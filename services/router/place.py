"""Where a request runs: offers to the replicas, then the append to the queue of the one that promised or lets it wait.

Nothing is answered before Redis has acknowledged the append. A reservation that is not used is freed. The first
placement follows the client's policy; a placement after a failure ends in best effort rather than in an error.
"""

import asyncio
from collections.abc import Sequence

from protos import router_pb2, types_pb2
from services.common import keys
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.request_record import RequestState
from services.common.request_store import QueueFullError, RequestStore
from services.core.slo import BEST_EFFORT
from services.router.candidate import candidate_of, current_stage, output_tokens
from services.router.fleet import Fleet
from services.router.joined import joined
from services.router.offers import Offers, held, taker
from services.router.planners import Planners
from services.router.settings import RouterSettings
from services.router.verdicts import (
    best_effort,
    earliest_retry_ms,
    hopeless,
    late_already,
    nearest,
    no_replica,
    rejected,
    verdict_word,
)

__all__ = ["Placer"]

_LONGEST_PAUSES = 4  # a waiting request is offered again after that many intervals even if nothing seems to change

Hops = Sequence[router_pb2.Hop]


class Placer:
    """Places requests. `stop_waiting` ends the calls that wait for room, so that another router takes them."""

    def __init__(
        self,
        *,
        store: RequestStore,
        fleet: Fleet,
        planners: Planners,
        offers: Offers,
        clock: Clock,
        settings: RouterSettings,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._planners = planners
        self._offers = offers
        self._clock = clock
        self._max_hops = settings.max_hops
        self._reoffer_s = settings.reoffer_ms / 1000
        self._best_effort_limit = settings.best_effort_limit or None
        self._draining = False

    def stop_waiting(self) -> None:
        """End the calls that wait for room."""
        self._draining = True

    async def place(
        self, request: types_pb2.QueuedRequest, policy: types_pb2.OnInfeasible.ValueType, previous_request_id: str = ""
    ) -> router_pb2.PlaceResponse:
        """Place a checked request for the first time, by the client's policy.

        Raises SloServeError: NO_REPLICA, NO_CAPACITY or PLANNER_UNAVAILABLE (policy REJECT, or WAIT in vain, with the
        verdict in the details), CLIENT_DEADLINE, BROKER_UNAVAILABLE, and what `RequestStore.enqueue` raises.
        """
        waits = policy == types_pb2.ON_INFEASIBLE_WAIT
        if waits:  # it waits here, not on a replica
            request.verdict_mode = types_pb2.VERDICT_MODE_FIRM
        session_replica = await self._session_replica(request.tenant, previous_request_id)
        hops, asked = await self._offer(request, session_replica, self._wait_until_us(request) if waits else 0)
        if taker(hops) is not None:
            return await self._take(request, hops, asked)
        if policy in (types_pb2.ON_INFEASIBLE_REJECT, types_pb2.ON_INFEASIBLE_WAIT):
            raise self._refusal(request, hops, asked, waited=waits)
        if not hops:
            raise no_replica()
        return await self._defer(request, hops, asked, self._best_effort_limit)

    async def place_again(self, request: types_pb2.QueuedRequest, lost_replica: str) -> router_pb2.PlaceResponse:
        """Place the next attempt of a request whose replica was lost; promised where a planner says so."""
        order = self._fleet.order(request, output_tokens(request), avoid=lost_replica)
        if not order:
            raise no_replica()
        request.verdict_mode = types_pb2.VERDICT_MODE_FIRM  # its client has been told, or has waited long enough
        hops = await self._round(request, self._fleet.shortlist(order, request, self._max_hops))
        if taker(hops) is not None:
            return await self._take(request, hops, len(hops))
        return await self._defer(request, hops, len(hops), None)

    async def _offer(
        self, request: types_pb2.QueuedRequest, session_replica: str | None, until_us: int
    ) -> tuple[Hops, int]:
        """Hops of the last round and the number of offers made; goes on until a replica takes it or `until_us`."""
        asked, patience_s = 0, 0.0
        while True:
            order = self._fleet.order(request, output_tokens(request), session_replica=session_replica)
            late = await self._late(request, order)
            if late is not None:
                return [late], asked
            shortlist = self._fleet.shortlist(order, request, self._max_hops)
            hops = await self._round(request, shortlist)
            asked += len(hops)
            left_s = (until_us - self._clock.now_us()) / 1e6
            pointless = hopeless(hops) and len(shortlist) == len(order)
            if taker(hops) is not None or pointless or left_s <= 0 or self._draining:
                return hops, asked
            await asyncio.sleep(min(left_s, self._reoffer_s))
            await self._fleet.wait_for_change(min(left_s, patience_s))
            patience_s = min(_LONGEST_PAUSES * self._reoffer_s, patience_s + self._reoffer_s)

    async def _late(self, request: types_pb2.QueuedRequest, order: Sequence[str]) -> router_pb2.Hop | None:
        """What any planner would say where it came too late already; None where they are to be asked."""
        alone_s = self._fleet.alone_s(order, request)
        verdict = late_already(request, current_stage(request), alone_s, self._clock.now_us())
        if verdict is None or not order:
            return None
        record = await self._store.get(request.request_id)
        placed = record is not None and record.state is not RequestState.NEW  # a repeated call: it has its answer
        return None if placed else router_pb2.Hop(replica_id=order[0], verdict=verdict)

    async def _round(self, request: types_pb2.QueuedRequest, shortlist: Sequence[str]) -> Hops:
        """Ask the replicas of a shortlist, and take note of who declined."""
        hops = await self._offers.round(candidate_of(request), current_stage(request), shortlist)
        for hop in hops:
            if not held(hop.verdict) and hop.verdict.constraint.kind != types_pb2.CONSTRAINT_KIND_NO_PLANNER:
                self._fleet.declined(hop.replica_id, request)
        return hops

    async def _take(self, request: types_pb2.QueuedRequest, hops: Hops, asked: int) -> router_pb2.PlaceResponse:
        """Append a promised or pending request to its replica's queue and confirm the reservation."""
        chosen = taker(hops)
        assert chosen is not None, "the caller has looked"
        verdict, replica_id = types_pb2.Verdict(), chosen.replica_id
        verdict.CopyFrom(chosen.verdict)
        verdict.hops = asked
        request.tier = current_stage(request).tier
        request.promised = verdict.kind == types_pb2.VERDICT_KIND_ADMITTED
        request.pending = not request.promised
        request.predicted_ttft_ms, request.predicted_tpot_ms = verdict.predicted_ttft_ms, verdict.predicted_tpot_ms
        stream = keys.queue_key(replica_id, request.tier)
        used = False
        for hop in hops:
            if hop is not chosen and hop.verdict.kind == types_pb2.VERDICT_KIND_PENDING:
                self._planners.release(hop.replica_id, request.request_id, request.attempt)
        try:
            response = await self._append(request, stream, replica_id, hops, verdict)
            used = response.stream == stream and response.attempt == request.attempt
        finally:
            if not used:
                self._planners.release(replica_id, request.request_id, request.attempt)
        if used:
            self._planners.commit(replica_id, request.request_id, request.attempt)
            self._fleet.placed(replica_id, request)
        return response

    async def _defer(
        self, request: types_pb2.QueuedRequest, hops: Hops, asked: int, limit: int | None
    ) -> router_pb2.PlaceResponse:
        """Append a request without a promise to the shared queue."""
        verdict = best_effort(current_stage(request), hops, asked, self._clock.now_us())
        request.tier, request.promised, request.pending = BEST_EFFORT, False, False
        request.predicted_ttft_ms = request.predicted_tpot_ms = 0.0
        try:
            return await self._append(request, keys.BEST_EFFORT_QUEUE, "", hops, verdict, limit)
        except QueueFullError as full:
            full.retry_after_ms = earliest_retry_ms(hops)  # by then a replica may promise it
            raise

    async def _append(
        self,
        request: types_pb2.QueuedRequest,
        stream: str,
        replica_id: str,
        hops: Hops,
        verdict: types_pb2.Verdict,
        limit: int | None = None,
    ) -> router_pb2.PlaceResponse:
        done = await self._store.enqueue(
            request,
            stream,
            verdict=verdict_word(verdict),
            replica_id=replica_id,
            hops=verdict.hops,
            queue_limit=limit,
        )
        if not done.fresh:  # a repeated call: what the first one did counts
            record = await self._store.get(request.request_id)
            if record is not None:
                return joined(record, current_stage(request), self._clock.now_us())
        return router_pb2.PlaceResponse(
            verdict=verdict,
            replica_id=replica_id,
            stream=done.stream,
            entry_id=done.entry_id,
            hops=hops,
            attempt=request.attempt,
        )

    def _wait_until_us(self, request: types_pb2.QueuedRequest) -> int:
        deadlines = [request.ttft_deadline_us, request.client_deadline_us]
        return min(deadline for deadline in deadlines if deadline)

    async def _session_replica(self, tenant: str, previous_request_id: str) -> str | None:
        """Where an earlier request of the session ran, by its own record: every router knows, whoever placed it."""
        record = await self._store.get(previous_request_id) if previous_request_id else None
        return record.replica_id or None if record is not None and record.tenant == tenant else None

    def _refusal(self, request: types_pb2.QueuedRequest, hops: Hops, asked: int, *, waited: bool) -> SloServeError:
        now_us = self._clock.now_us()
        if waited and self._draining:
            return SloServeError(Reason.ROUTER_UNAVAILABLE, "this router is stopping", retry_after_ms=0.0)
        if waited and 0 < request.client_deadline_us <= now_us:
            return SloServeError(Reason.CLIENT_DEADLINE, f"no room until the client's deadline, {asked} offers")
        if not hops:
            return no_replica()
        stage = current_stage(request)
        found = nearest(hops)
        why = f": {found.constraint.detail}" if found is not None and found.constraint.detail else ""
        kinds = {hop.verdict.constraint.kind for hop in hops}
        away = kinds == {types_pb2.CONSTRAINT_KIND_NO_PLANNER}
        return SloServeError(
            Reason.PLANNER_UNAVAILABLE if away else Reason.NO_CAPACITY,
            f"no replica can promise {stage.ttft_ms:g} ms to the first token and {stage.tpot_ms:g} ms per token{why}",
            retry_after_ms=earliest_retry_ms(hops),
            details=(rejected(stage, hops, asked, now_us),),
        )
