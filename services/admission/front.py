"""Opening a request: from a raw message to a session with its verdict.

Order matters: everything that can be refused without touching another process is refused first.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from protos import admission_pb2, router_pb2
from services.admission.accounts import Accounts
from services.admission.auth import Caller, authenticate, check_permitted
from services.admission.endings import Endings
from services.admission.handover import Handover
from services.admission.queueing import body_digest, output_rules, queued_request
from services.admission.request_trace import RequestTrace
from services.admission.routers import Routers
from services.admission.session import Session, SessionFacts
from services.admission.sessions import Sessions
from services.admission.slo import ReplicaSpeed, resolve_stages, stage_tiers
from services.admission.tokens import ModelTokens
from services.admission.validate import CUSTOM, Known, ValidRequest, tokenisable, validate
from services.common.clock import Clock
from services.common.config import Catalogue
from services.common.errors import Reason, SloServeError
from services.common.request_record import BeginResult, RequestState
from services.common.request_store import RequestStore
from services.common.wire import perf_model_from_wire

__all__ = ["Arrival", "Front"]

_INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that nobody's tokens wait for them."""
_NO_DEADLINE_S = 10 * 365 * 86400.0

Fleet = Callable[[], Awaitable[Mapping[str, router_pb2.Replica]]]
"""The live replicas, read again where none was known."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came with a call besides its message. `remaining_s`: what the client's deadline leaves."""

    metadata: Iterable[tuple[str, str | bytes]]
    remaining_s: float | None
    at_us: int

    @property
    def deadline_us(self) -> int:
        """The client's deadline, 0 where it has none."""
        if self.remaining_s is None or self.remaining_s > _NO_DEADLINE_S:
            return 0
        return self.at_us + round(self.remaining_s * 1e6)


class Front:
    """Opens requests. All of its collaborators are shared with the rest of the process."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        tokens: ModelTokens,
        admission_id: str,
        keep_s: float,
        clock: Clock,
        fleet: Fleet,
        store: RequestStore,
        routers: Routers,
        sessions: Sessions,
        handover: Handover,
        endings: Endings,
        accounts: Accounts,
    ) -> None:
        self._catalogue = catalogue
        self._tiers = catalogue.tier_list()
        self._tokens = tokens
        self._admission_id = admission_id
        self._keep_s = keep_s
        self._clock = clock
        self._fleet = fleet
        self._store = store
        self._routers = routers
        self._sessions = sessions
        self._handover = handover
        self._endings = endings
        self._accounts = accounts

    def caller(self, arrival: Arrival) -> Caller:
        """The tenant of a call."""
        return authenticate(arrival.metadata, self._catalogue)

    async def open(self, request: admission_pb2.GenerateRequest, arrival: Arrival) -> Session:
        """A session whose verdict is known; the same one where a client repeats its request."""
        trace = RequestTrace("request", {"slos_serve.application": request.application or CUSTOM})
        try:
            with trace.active(), trace.step("admit"):
                return await self._admit(request, arrival, trace)
        except SloServeError as error:
            known = request.application in self._catalogue.applications
            self._accounts.refused(request.application if known else CUSTOM, error)
            trace.end({}, error.text)
            raise
        except asyncio.CancelledError:
            trace.end({}, "the client is gone")
            raise

    async def _admit(self, request: admission_pb2.GenerateRequest, arrival: Arrival, trace: RequestTrace) -> Session:
        caller = self.caller(arrival)
        replicas = await self._fleet()
        valid = await self._validate(request, replicas, trace)
        self._accounts.offered(valid.application)
        speeds = [
            ReplicaSpeed(replica.replica_id, perf_model_from_wire(replica.perf_model))
            for replica in replicas.values()
            if replica.perf_model.segments
        ]
        tiers = stage_tiers(valid.stages, self._tiers)
        stages = resolve_stages(valid.stages, len(valid.prompt_ids), speeds, self._catalogue.ttft_floor_ms / 1000)
        check_permitted(caller, stages)
        request_id = valid.request_id or uuid.uuid4().hex
        queued = queued_request(
            valid,
            stages,
            tiers,
            self._tokens,
            request_id=request_id,
            tenant=caller.tenant,
            admission_id=self._admission_id,
            arrival_us=arrival.at_us,
            client_deadline_us=arrival.deadline_us,
            trace=trace.context,
        )
        repeated = await self._begin(queued.request_id, request, caller, valid, arrival, trace)
        if repeated is not None:
            trace.end({"slos_serve.reattached": True})
            return repeated
        facts = SessionFacts(
            queued=queued,
            rules=output_rules(queued, self._tokens, valid.last_stage_limit),
            on_infeasible=valid.on_infeasible,
            resume_grace_s=valid.resume_grace_s,
            keep_s=self._keep_s if valid.request_id or valid.resume_grace_s else 0.0,
        )
        session = Session(facts, self._tokens.decode, trace)
        self._sessions.add(session)
        await self._place(session, arrival)
        return session

    async def _validate(
        self,
        request: admission_pb2.GenerateRequest,
        replicas: Mapping[str, router_pb2.Replica],
        trace: RequestTrace,
    ) -> ValidRequest:
        # what the engines really hold decides; the model's own figure only stands in until one is live
        limits = [replica.max_model_len for replica in replicas.values() if replica.max_model_len]
        context_tokens = max(limits) if limits else self._tokens.context_tokens
        if context_tokens is None:
            raise SloServeError(Reason.NO_REPLICA, "no replica is live", retry_after_ms=1000.0)
        known = Known(self._catalogue, self._tokens, context_tokens)
        ids: list[int] = []
        if tokenisable(request, known):
            with trace.step("tokenise") as span:
                if len(request.text) > _INLINE_CHARS:
                    ids = await asyncio.to_thread(self._tokens.encode, request.text)
                else:
                    ids = self._tokens.encode(request.text)
                span.set_attribute("slos_serve.prompt_tokens", len(ids))
        return validate(request, ids, known)

    async def _begin(
        self,
        request_id: str,
        request: admission_pb2.GenerateRequest,
        caller: Caller,
        valid: ValidRequest,
        arrival: Arrival,
        trace: RequestTrace,
    ) -> Session | None:
        """Register the request; the session it already has where it is a retry."""
        begun = await self._store.begin(
            request_id,
            digest=body_digest(request),
            admission_id=self._admission_id,
            tenant=caller.tenant,
            application=valid.application,
            arrival_us=arrival.at_us,
            traceparent=trace.context.traceparent,
        )
        if begun is BeginResult.NEW:
            return None
        if begun is BeginResult.CONFLICT:
            raise SloServeError(Reason.REQUEST_CONFLICT, f"request_id {request_id!r} belongs to another request")
        session = self._sessions.get(request_id)
        if session is not None:
            return session
        record = await self._store.get(request_id)
        if record is None or record.state is RequestState.NEW:
            return None  # its first try never got a place
        try:
            return await self._handover.take(request_id, 0, caller.tenant)
        except SloServeError as error:
            if error.reason is not Reason.REQUEST_UNKNOWN:
                raise
            text = f"request_id {request_id!r} has been used and cannot be attached to: {error.text}"
            raise SloServeError(Reason.REQUEST_CONFLICT, text) from None

    async def _place(self, session: Session, arrival: Arrival) -> None:
        try:
            remaining_s = self._remaining_s(arrival)
            response = await self._routers.place(session.facts.queued, session.facts.on_infeasible, remaining_s)
        except SloServeError as error:
            session.fail(error)
            self._endings.not_placed(session, error)
            self._sessions.drop(session)
            raise
        except asyncio.CancelledError:
            self._endings.give_up(session)
            raise
        session.last_heard_s = self._clock.now_s()
        session.placed(response)
        if session.facts.resume_grace_s > 0:
            await self._handover.leave(session)

    def _remaining_s(self, arrival: Arrival) -> float | None:
        if not arrival.deadline_us:
            return None
        remaining_s = (arrival.deadline_us - self._clock.now_us()) / 1e6
        if remaining_s <= 0:
            raise SloServeError(Reason.CLIENT_DEADLINE, "the deadline passed before the request was placed")
        return remaining_s
