"""The `Admission` service: gRPC calls turned into sessions, sessions into event streams."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio

from protos import admission_pb2, admission_pb2_grpc
from services.admission.arrival import Arrival
from services.admission.endings import Endings, unknown_request
from services.admission.explaining import Explainer
from services.admission.front import Front
from services.admission.handover import Handover
from services.admission.quoting import Quoter
from services.admission.resolve import Resolver
from services.admission.session import Session
from services.admission.sessions import Sessions
from services.admission.validate import check_request_id
from services.admission.violations import Violations
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError

__all__ = ["SERVICE", "AdmissionService"]

SERVICE = "slosserve.v1.Admission"
DRAIN_RETRY_MS = 1000.0

Context = grpc.aio.ServicerContext[Any, Any]
Events = AsyncIterator[admission_pb2.GenerateEvent]


class AdmissionService(admission_pb2_grpc.AdmissionServicer):
    """What clients call. After `drain` new requests are refused and running ones end as they would."""

    def __init__(
        self,
        *,
        resolver: Resolver,
        front: Front,
        quoter: Quoter,
        explainer: Explainer,
        sessions: Sessions,
        handover: Handover,
        endings: Endings,
        clock: Clock,
    ) -> None:
        self._resolver = resolver
        self._front = front
        self._quoter = quoter
        self._explainer = explainer
        self._sessions = sessions
        self._handover = handover
        self._endings = endings
        self._clock = clock
        self.draining = False

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    async def Generate(self, request: admission_pb2.GenerateRequest, context: Context) -> Events:
        """Serve a request; see docs/api.md."""
        self._refuse_while_draining()
        with self._sessions.call():
            session = await self._front.open(request, self._arrival(context))
            with self._reading(session, 0, context) as events:
                async for event in events:
                    yield event

    async def Resume(self, request: admission_pb2.ResumeRequest, context: Context) -> Events:
        """Attach to a request again, from any token on, whichever process served it."""
        self._refuse_while_draining()
        with self._sessions.call():
            session = await self._resumed(request, self._resolver.caller(self._arrival(context)).tenant)
            with self._reading(session, request.from_token, context) as events:
                async for event in events:
                    yield event

    async def Cancel(self, request: admission_pb2.CancelRequest, context: Context) -> admission_pb2.CancelResponse:
        """End a request and free what it holds."""
        tenant = self._resolver.caller(self._arrival(context)).tenant
        _check_id(request.request_id)
        return admission_pb2.CancelResponse(cancelled=await self._endings.cancel(request.request_id, tenant))

    async def Converse(
        self, request_iterator: AsyncIterator[admission_pb2.ConverseRequest], context: Context
    ) -> Events:
        """Not yet served."""
        async for _ in request_iterator:  # a stream refused before its first message was read may lose the reason
            raise SloServeError(
                Reason.NOT_IMPLEMENTED, "Converse is not served yet: send each round as its own Generate"
            )
        if False:
            yield  # makes this an async generator, as every streaming handler must be

    async def Quote(self, request: admission_pb2.QuoteRequest, context: Context) -> admission_pb2.QuoteResponse:
        """Would this request be promised now; if not, what would be, or when."""
        self._refuse_while_draining()
        return await self._quoter.quote(request.request, self._arrival(context))

    async def Explain(self, request: admission_pb2.ExplainRequest, context: Context) -> admission_pb2.ExplainResponse:
        """Why a request was deferred, rejected or late."""
        tenant = self._resolver.caller(self._arrival(context)).tenant
        _check_id(request.request_id)
        return await self._explainer.explain(request.request_id, tenant)

    async def _resumed(self, request: admission_pb2.ResumeRequest, tenant: str) -> Session:
        _check_id(request.request_id)
        session = self._sessions.get(request.request_id)
        if session is None:
            return await self._handover.take(request.request_id, request.from_token, tenant)
        if session.facts.queued.tenant != tenant:
            raise unknown_request(request.request_id)
        have = len(session.transcript.ids)
        if request.from_token > have:
            text = f"from_token is {request.from_token}, request {request.request_id!r} has {have} output tokens"
            raise SloServeError(Reason.RESUME_OUT_OF_RANGE, text)
        return session

    @contextmanager
    def _reading(self, session: Session, from_token: int, context: Context) -> Iterator[Events]:
        """The events of a session for one stream, which is its reader meanwhile."""
        reader = self._sessions.attach(session, from_token)

        # A stream may be dropped while a message is being written: then only the callback hears of it.
        callback: Any = lambda _: self._sessions.detach(session, reader)  # noqa: E731
        context.add_done_callback(callback)
        try:
            yield reader.events()
        finally:
            self._sessions.detach(session, reader)

    def _arrival(self, context: Context) -> Arrival:
        metadata: Any = context.invocation_metadata() or ()
        return Arrival(tuple(metadata), context.time_remaining(), self._clock.now_us())

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise SloServeError(
                Reason.ADMISSION_DRAINING, "this admission process is shutting down", retry_after_ms=DRAIN_RETRY_MS
            )


def _check_id(request_id: str) -> None:
    violations = Violations()
    check_request_id(request_id, violations, needed=True)
    violations.raise_if_any()
