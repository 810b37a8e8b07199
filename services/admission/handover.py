"""Requests that move from one admission process to another.

With a resume grace, what another process needs to serve the request is kept in its `slos:req:{id}` hash: the request
as it was placed, its verdict and its grace. The tokens are in the worker's memory.
"""

from dataclasses import dataclass

from protos import router_pb2, types_pb2
from services.admission.queueing import output_rules
from services.admission.record_notes import RecordNotes
from services.admission.request_trace import RequestTrace
from services.admission.session import Session, SessionFacts
from services.admission.sessions import Sessions
from services.admission.tokens import ModelTokens
from services.admission.workers import Workers
from services.common.errors import Reason, SloServeError
from services.common.request_record import RequestRecord, RequestState
from services.common.request_store import RequestStore
from services.common.telemetry import TraceContext

__all__ = ["Handover"]


@dataclass(frozen=True, slots=True)
class _Kept:
    queued: types_pb2.QueuedRequest
    verdict: types_pb2.Verdict
    grace_s: float
    on_infeasible: types_pb2.OnInfeasible.ValueType
    last_stage_limit: int | None


class Handover:
    """Leaves requests for other processes, and takes theirs."""

    def __init__(
        self,
        notes: RecordNotes,
        store: RequestStore,
        sessions: Sessions,
        workers: Workers,
        tokens: ModelTokens,
        admission_id: str,
        keep_s: float,
    ) -> None:
        self._notes = notes
        self._store = store
        self._sessions = sessions
        self._workers = workers
        self._tokens = tokens
        self._admission_id = admission_id
        self._keep_s = keep_s

    async def leave(self, session: Session) -> None:
        """Store what another process needs to resume this session."""
        facts = session.facts
        verdict = session.verdict or types_pb2.Verdict()
        await self._notes.write(
            session.request_id,
            resume_request=facts.queued.SerializeToString(),
            resume_verdict=verdict.SerializeToString(),
            resume_grace_s=facts.resume_grace_s,
            resume_on_infeasible=facts.on_infeasible,
            resume_last_stage_limit=facts.rules.last_stage_limit or 0,
        )

    async def is_mine(self, request_id: str) -> bool:
        """False once another process serves the request."""
        record = await self._store.get(request_id)
        return record is None or record.admission_id == self._admission_id

    async def take(self, request_id: str, from_token: int, tenant: str) -> Session:
        """Serve a request from here on that another process served; its output is complete from token 0.

        NOT_FOUND where it is unknown, ended, another tenant's, or was opened without a grace; OUT_OF_RANGE where it
        has not produced `from_token` tokens.
        """
        record = await self._store.get(request_id)
        if record is None or record.tenant != tenant:
            raise SloServeError(Reason.REQUEST_UNKNOWN, f"no request {request_id!r}")
        if record.state in (RequestState.CANCELLED, RequestState.FAILED):
            raise SloServeError(Reason.REQUEST_UNKNOWN, f"request {request_id!r} is {record.state}")
        kept = await self._kept(request_id)
        if kept is None:
            text = f"request {request_id!r} was opened without resume_grace_s and belongs to its own stream"
            raise SloServeError(Reason.REQUEST_UNKNOWN, text)
        await self._check_range(record, from_token)
        session = self._session(record, kept)
        self._sessions.add(session)
        await self._notes.write(request_id, admission=self._admission_id)
        self._workers.attach(session)
        return session

    def _session(self, record: RequestRecord, kept: _Kept) -> Session:
        facts = SessionFacts(
            queued=kept.queued,
            rules=output_rules(kept.queued, self._tokens, kept.last_stage_limit),
            on_infeasible=kept.on_infeasible,
            resume_grace_s=kept.grace_s,
            keep_s=self._keep_s,
        )
        parent = TraceContext(kept.queued.traceparent, kept.queued.tracestate)
        trace = RequestTrace("resume", {"slos_serve.request_id": record.request_id}, parent)
        session = Session(facts, self._tokens.decode, trace)
        session.placed(
            router_pb2.PlaceResponse(verdict=kept.verdict, replica_id=record.replica_id, attempt=record.attempt)
        )
        first_token_us = record.times_us.get("first_token_us")
        if first_token_us:  # the SLO clock kept running: it was sent about then
            session.clock.tokens_sent(1, first_token_us)
        return session

    async def _check_range(self, record: RequestRecord, from_token: int) -> None:
        if from_token == 0 and record.state is not RequestState.FINISHED:
            return
        link = self._workers.link(record.replica_id)
        try:
            found = link is not None and (await link.attach(record.request_id, from_token)).found
        except SloServeError as error:
            if error.reason is not Reason.WORKER_LOST or record.state is RequestState.FINISHED:
                raise
            return  # its worker died too: whoever goes on with the request has what it had, or makes it again
        if not found and record.state is RequestState.FINISHED:
            raise SloServeError(
                Reason.REQUEST_UNKNOWN, f"request {record.request_id!r} has finished and its output is gone"
            )
        if not found and record.state is not RequestState.RUNNING:
            text = f"from_token is {from_token}, request {record.request_id!r} has no output yet"
            raise SloServeError(Reason.RESUME_OUT_OF_RANGE, text)

    async def _kept(self, request_id: str) -> _Kept | None:
        names = ("request", "verdict", "grace_s", "on_infeasible", "last_stage_limit")
        kept = await self._notes.read(request_id, *(f"resume_{name}" for name in names))
        request, verdict, grace_s, on_infeasible, last_stage_limit = kept
        if request is None or verdict is None or grace_s is None or on_infeasible is None or last_stage_limit is None:
            return None
        return _Kept(
            types_pb2.QueuedRequest.FromString(request),
            types_pb2.Verdict.FromString(verdict),
            float(grace_s),
            types_pb2.OnInfeasible.ValueType(int(on_infeasible)),
            int(last_stage_limit) or None,
        )
