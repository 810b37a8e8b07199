"""Rejections, kept for whoever asks why: a rejected request has no session, only the hash it was registered in.

A request is rejected before it is placed (attempt 0), or, where its verdict was pending, by the replica that ran an
attempt. A rejection speaks of the request as long as no later attempt was placed.
"""

import logging

from google.protobuf import any_pb2

from protos import types_pb2
from services.admission.record_notes import RecordNotes
from services.common.errors import Reason, SloServeError
from services.common.request_record import RequestRecord

__all__ = ["Refusals"]

_log = logging.getLogger(__name__)

_SHED = (Reason.NO_CAPACITY, Reason.NO_REPLICA, Reason.PLANNER_UNAVAILABLE)
_KEPT, _ATTEMPT = "refusal", "refusal_attempt"


class Refusals:
    """Keeps the verdict of a rejected request until its hash expires or another attempt is placed."""

    def __init__(self, notes: RecordNotes) -> None:
        self._notes = notes

    async def keep(self, request_id: str, error: SloServeError, attempt: int = 0) -> None:
        """Store why a request was refused. Other errors are no verdicts; nor is this worth failing for."""
        if error.reason not in _SHED:
            return
        try:
            verdict = _verdict_of(error).SerializeToString()
            await self._notes.write(request_id, verdict="rejected", refusal=verdict, refusal_attempt=attempt)
        except SloServeError as away:
            _log.info("rejection of %s is not kept: %s", request_id, away)

    async def of(self, record: RequestRecord) -> types_pb2.Verdict | None:
        """The verdict of a request that was rejected; None where it was not, or has been placed since."""
        kept, attempt = await self._notes.read(record.request_id, _KEPT, _ATTEMPT)
        current = kept is not None and int(attempt or 0) == record.attempt
        return types_pb2.Verdict.FromString(kept) if kept is not None and current else None


def _verdict_of(error: SloServeError) -> types_pb2.Verdict:
    """The verdict in the details of an error, else one that says what the error says."""
    for detail in error.details:
        if isinstance(detail, types_pb2.Verdict):
            return detail
        verdict = types_pb2.Verdict()
        if isinstance(detail, any_pb2.Any) and detail.Unpack(verdict):
            return verdict
    verdict = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_REJECTED, retry_after_ms=error.retry_after_ms or 0.0)
    verdict.constraint.detail = error.text
    return verdict
