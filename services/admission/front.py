"""Opening a request: from a raw message to a session with its verdict.

Order matters: everything that can be refused without touching another process is refused first.
"""

import asyncio
import contextlib
import uuid

from protos import admission_pb2, types_pb2
from services.admission.accounts import Accounts
from services.admission.arrival import Arrival
from services.admission.auth import Caller
from services.admission.comebacks import Comebacks
from services.admission.doorkeeper import Doorkeeper
from services.admission.endings import Endings
from services.admission.handover import Handover
from services.admission.queueing import body_digest, output_rules
from services.admission.refusals import Refusals
from services.admission.request_trace import RequestTrace
from services.admission.resolve import Checked, Resolver
from services.admission.routers import Routers
from services.admission.session import Session, SessionFacts
from services.admission.sessions import Sessions
from services.admission.tokens import ModelTokens
from services.admission.validate import CUSTOM, ValidRequest
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.request_record import BeginResult, RequestState
from services.common.request_store import RequestStore

__all__ = ["Front"]


class Front:
    """Opens requests. All of its collaborators are shared with the rest of the process."""

    def __init__(
        self,
        *,
        resolver: Resolver,
        tokens: ModelTokens,
        admission_id: str,
        keep_s: float,
        clock: Clock,
        store: RequestStore,
        routers: Routers,
        sessions: Sessions,
        handover: Handover,
        endings: Endings,
        refusals: Refusals,
        accounts: Accounts,
        doorkeeper: Doorkeeper,
        comebacks: Comebacks,
    ) -> None:
        self._resolver = resolver
        self._tokens = tokens
        self._admission_id = admission_id
        self._keep_s = keep_s
        self._clock = clock
        self._store = store
        self._routers = routers
        self._sessions = sessions
        self._handover = handover
        self._endings = endings
        self._refusals = refusals
        self._accounts = accounts
        self._doorkeeper = doorkeeper
        self._comebacks = comebacks

    async def open(self, request: admission_pb2.GenerateRequest, arrival: Arrival) -> Session:
        """A session whose verdict is known; the same one where a client repeats its request."""
        application = request.application if self._resolver.configured(request.application) else CUSTOM
        policy = self._resolver.policy(request)
        try:
            self._let_in(application, policy)
            with self._doorkeeper.passing(policy):
                return await self._traced(request, arrival)
        except SloServeError as error:
            self._accounts.refused(application, error)
            raise

    def _let_in(self, application: str, policy: types_pb2.OnInfeasible.ValueType) -> None:
        try:
            self._doorkeeper.let_in(policy)
        except SloServeError:
            self._accounts.offered(application)  # it counts, although nobody has looked whether it is valid
            raise

    async def _traced(self, request: admission_pb2.GenerateRequest, arrival: Arrival) -> Session:
        trace = RequestTrace("request", {"slos_serve.application": request.application or CUSTOM})
        try:
            with trace.active(), trace.step("admit"):
                return await self._admit(request, arrival, trace)
        except SloServeError as error:
            trace.end({}, error.text)
            raise
        except asyncio.CancelledError:
            trace.end({}, "the client is gone")
            raise

    async def _admit(self, request: admission_pb2.GenerateRequest, arrival: Arrival, trace: RequestTrace) -> Session:
        checked = await self._resolver.check(request, arrival, trace)
        caller, valid = checked.caller, checked.valid
        self._accounts.offered(valid.application)
        queued = self._resolver.resolve(checked, valid.request_id or uuid.uuid4().hex, arrival, trace)
        named = bool(valid.request_id)
        if valid.on_infeasible == types_pb2.ON_INFEASIBLE_REJECT and self._sessions.get(queued.request_id) is None:
            self._refuse_late(queued, checked)
        begun = self._begin(queued.request_id, request, caller, valid, arrival, trace)
        if named and (repeated := await begun) is not None:
            trace.end({"slos_serve.reattached": True})
            return repeated
        facts = SessionFacts(
            queued=queued,
            rules=output_rules(queued, self._tokens, valid.last_stage_limit),
            on_infeasible=valid.on_infeasible,
            resume_grace_s=valid.resume_grace_s,
            keep_s=self._keep_s if named or valid.resume_grace_s else 0.0,
        )
        session = Session(facts, self._tokens.decode, trace)
        self._sessions.add(session)
        # An id of our own repeats nobody's request, so it is registered while its place is found.
        registering = None if named else asyncio.ensure_future(begun)
        try:
            await self._place(session, arrival, valid.previous_request_id, registering)
        finally:
            if registering is not None:
                registering.cancel()
        return session

    def _refuse_late(self, queued: types_pb2.QueuedRequest, checked: Checked) -> None:
        try:
            self._doorkeeper.check(queued, self._resolver.alone_s(checked))
        except SloServeError as error:
            self._comebacks.pace(error)
            raise

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

    async def _place(
        self,
        session: Session,
        arrival: Arrival,
        previous_request_id: str,
        registering: asyncio.Future[Session | None] | None,
    ) -> None:
        try:
            remaining_s = self._remaining_s(arrival)
            with self._doorkeeper.placing(session.facts.on_infeasible):
                response = await self._routers.place(
                    session.facts.queued, session.facts.on_infeasible, remaining_s, previous_request_id
                )
        except SloServeError as error:
            self._comebacks.pace(error)
            error.metadata.setdefault("request_id", session.request_id)  # to ask Explain about
            session.fail(error)
            self._endings.not_placed(session, error)
            self._sessions.drop(session)
            await _registered(registering)  # what is kept goes into the hash that it makes
            await self._refusals.keep(session.request_id, error)
            raise
        except asyncio.CancelledError:
            self._endings.give_up(session)
            raise
        session.last_heard_s = self._clock.now_s()
        session.placed(response)
        if session.promised:
            self._comebacks.taken()
        await _registered(registering)
        if session.facts.resume_grace_s > 0:
            await self._handover.leave(session)

    def _remaining_s(self, arrival: Arrival) -> float | None:
        if not arrival.deadline_us:
            return None
        remaining_s = (arrival.deadline_us - self._clock.now_us()) / 1e6
        if remaining_s <= 0:
            raise SloServeError(Reason.CLIENT_DEADLINE, "the deadline passed before the request was placed")
        return remaining_s


async def _registered(registering: asyncio.Future[Session | None] | None) -> None:
    """Wait for a registration that was begun beside the placement; without Redis the placement says so."""
    if registering is not None:
        with contextlib.suppress(SloServeError):
            await registering
