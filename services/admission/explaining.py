"""Explanations: why a request was deferred, rejected or late.

Its session knows most: the hops of its placement, what was promised and what was delivered. For a request of another
process, or one whose session is gone, its record in Redis and the memory of the planners tell what they can.
"""

import logging
import math
from collections.abc import Iterable, Sequence

from protos import admission_pb2, router_pb2, types_pb2
from services.admission.endings import unknown_request
from services.admission.lifecycle import State
from services.admission.reasons import (
    change_sentences,
    late_sentences,
    record_sentences,
    verdict_sentence,
    way_sentence,
)
from services.admission.refusals import Refusals
from services.admission.routers import Routers
from services.admission.session import Session
from services.admission.sessions import Sessions
from services.common.clock import Clock
from services.common.errors import SloServeError
from services.common.request_record import RequestRecord, RequestState
from services.common.request_store import RequestStore
from services.core.slo import BEST_EFFORT

__all__ = ["Explainer"]

_log = logging.getLogger(__name__)

_STATES = {
    State.PLACING: RequestState.NEW,
    State.WAITING: RequestState.QUEUED,
    State.STREAMING: RequestState.RUNNING,
    State.REPLACING: RequestState.QUEUED,
    State.FINISHED: RequestState.FINISHED,
    State.CANCELLED: RequestState.CANCELLED,
    State.FAILED: RequestState.FAILED,
}
"""A session's state in the words of the record."""

_REJECTED = "rejected"

Hops = Sequence[router_pb2.Hop]


class Explainer:
    """Explains requests to the tenant they belong to."""

    def __init__(
        self, store: RequestStore, refusals: Refusals, sessions: Sessions, routers: Routers, clock: Clock
    ) -> None:
        self._store = store
        self._refusals = refusals
        self._sessions = sessions
        self._routers = routers
        self._clock = clock

    async def explain(self, request_id: str, tenant: str) -> admission_pb2.ExplainResponse:
        """The explanation of a request, whichever process serves or served it.

        NOT_FOUND for an unknown, long ended or another tenant's request, UNAVAILABLE where Redis is needed and away.
        """
        session = self._sessions.get(request_id)
        if session is not None:
            if session.facts.queued.tenant != tenant:
                raise unknown_request(request_id)
            return await self._of_session(session)
        record = await self._store.get(request_id)
        if record is None or record.tenant != tenant:
            raise unknown_request(request_id)
        refusal = await self._refusals.of(record)
        return await (self._of_record(record) if refusal is None else self._of_refusal(record, refusal))

    async def _of_session(self, session: Session) -> admission_pb2.ExplainResponse:
        hops: Hops = session.hops
        notes: list[str] = []
        if not hops:  # not placed yet, or placed by a call before this one
            hops, notes = await self._remembered(session.request_id)
        verdict = session.verdict or types_pb2.Verdict()
        if verdict.kind == types_pb2.VERDICT_KIND_REJECTED:
            return _response(verdict, hops, _REJECTED, [verdict_sentence(verdict), *notes])
        reports = session.clock.reports()
        waited_ms = (self._clock.now_us() - session.facts.queued.arrival_us) / 1000
        ended = session.state.ended
        first = session.first_verdict
        why = [verdict_sentence(first if first is not None else verdict), *change_sentences(session.markers)]
        why += late_sentences(reports, waited_ms, ended=ended)
        if reports[0].output_tokens and reports[0].ttft_ms > reports[0].ttft_slo_ms > 0:
            why += await self._way(session.request_id)
        if session.met:
            why.append("every stage met its SLO")
        if session.error is not None:
            why.append(f"it failed: {session.error.text}")
        return _response(verdict, hops, _STATES[session.state], [*why, *notes], reports)

    async def _of_record(self, record: RequestRecord) -> admission_pb2.ExplainResponse:
        hops, notes = await self._remembered(record.request_id)
        verdict = _verdict(record, hops)
        why = [verdict_sentence(verdict), *record_sentences(record, verdict)]
        return _response(verdict, hops, record.state, [*why, *notes])

    async def _of_refusal(self, record: RequestRecord, refusal: types_pb2.Verdict) -> admission_pb2.ExplainResponse:
        hops, notes = await self._remembered(record.request_id)
        return _response(refusal, hops, _REJECTED, [verdict_sentence(refusal), *notes])

    async def _remembered(self, request_id: str) -> tuple[Hops, list[str]]:
        """What the planners remember, and a note where they could not be asked: the rest is still worth telling."""
        try:
            return (await self._routers.explain(request_id)).hops, []
        except SloServeError as error:
            return (), [f"the planners could not be asked: {error.text}"]

    async def _way(self, request_id: str) -> list[str]:
        try:
            record = await self._store.get(request_id)
        except SloServeError as error:
            _log.info("way of %s: %s", request_id, error)
            return []
        sentence = way_sentence(record) if record is not None else None
        return [sentence] if sentence else []


def _verdict(record: RequestRecord, hops: Hops) -> types_pb2.Verdict:
    """The verdict in force by the record, filled in from what the planners remember."""
    word = f"VERDICT_KIND_{record.verdict.upper()}"
    known = word in types_pb2.VerdictKind.keys()  # noqa: SIM118  (an enum, not a mapping)
    kind = types_pb2.VerdictKind.Value(word) if known else types_pb2.VERDICT_KIND_UNSPECIFIED
    verdict = types_pb2.Verdict()
    if kind == types_pb2.VERDICT_KIND_ADMITTED:
        promises = [hop.verdict for hop in hops if hop.verdict.kind == kind]
        if promises:
            verdict.CopyFrom(promises[-1])
        verdict.replica_id, verdict.tier = record.replica_id, record.tier
    elif kind == types_pb2.VERDICT_KIND_BEST_EFFORT:
        refusals = [hop.verdict for hop in hops if hop.verdict.constraint.kind]
        if refusals:
            verdict.CopyFrom(min(refusals, key=lambda said: said.predicted_ttft_ms or math.inf))
        verdict.tier = BEST_EFFORT
    verdict.kind = kind
    verdict.hops = int(record.fields.get("hops", "0"))
    return verdict


def _response(
    verdict: types_pb2.Verdict,
    hops: Hops,
    state: str,
    why: Iterable[str],
    stages: Iterable[admission_pb2.StageReport] = (),
) -> admission_pb2.ExplainResponse:
    said = [admission_pb2.HopReport(replica_id=hop.replica_id, verdict=hop.verdict) for hop in hops]
    return admission_pb2.ExplainResponse(verdict=verdict, hops=said, stages=stages, state=str(state), why=why)
