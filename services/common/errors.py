"""Typed errors and the one table from error to gRPC status.

Every error carries an `ErrorInfo` whose reason comes from `Reason`. Malformed input adds `BadRequest` field violations;
shed load adds `RetryInfo` and the `grpc-retry-pushback-ms` trailer that retrying gRPC clients obey.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import cast

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = [
    "DOMAIN",
    "FieldViolation",
    "InvalidRequestError",
    "Reason",
    "SloServeError",
    "from_rpc_error",
    "pushback_trailer",
    "to_status",
]

DOMAIN = "slosserve.v1"


class Reason(StrEnum):
    """Closed list of error reasons, sent as `ErrorInfo.reason`."""

    ADMISSION_DRAINING = "ADMISSION_DRAINING"
    ADMISSION_UNAVAILABLE = "ADMISSION_UNAVAILABLE"
    BROKER_UNAVAILABLE = "BROKER_UNAVAILABLE"
    CLIENT_DEADLINE = "CLIENT_DEADLINE"
    ENGINE_FAILED = "ENGINE_FAILED"
    INTERNAL = "INTERNAL"
    INVALID_FIELD = "INVALID_FIELD"
    KEY_UNKNOWN = "KEY_UNKNOWN"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    NO_CAPACITY = "NO_CAPACITY"
    NO_REPLICA = "NO_REPLICA"
    PLANNER_UNAVAILABLE = "PLANNER_UNAVAILABLE"
    REPLICA_UNKNOWN = "REPLICA_UNKNOWN"
    REQUEST_CANCELLED = "REQUEST_CANCELLED"
    REQUEST_CONFLICT = "REQUEST_CONFLICT"
    REQUEST_UNKNOWN = "REQUEST_UNKNOWN"
    RESUME_OUT_OF_RANGE = "RESUME_OUT_OF_RANGE"
    ROUTER_UNAVAILABLE = "ROUTER_UNAVAILABLE"
    SLO_IMPOSSIBLE = "SLO_IMPOSSIBLE"
    SLO_NOT_PERMITTED = "SLO_NOT_PERMITTED"
    STATE_INVALID = "STATE_INVALID"
    WORKER_LOST = "WORKER_LOST"


_CODES: dict[Reason, grpc.StatusCode] = {
    Reason.ADMISSION_DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.ADMISSION_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.BROKER_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.CLIENT_DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.ENGINE_FAILED: grpc.StatusCode.INTERNAL,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.KEY_UNKNOWN: grpc.StatusCode.UNAUTHENTICATED,
    Reason.NOT_IMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.NO_CAPACITY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.NO_REPLICA: grpc.StatusCode.UNAVAILABLE,
    Reason.PLANNER_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.REPLICA_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.REQUEST_CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.REQUEST_CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    Reason.REQUEST_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.RESUME_OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Reason.ROUTER_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.SLO_IMPOSSIBLE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SLO_NOT_PERMITTED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.STATE_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One malformed field: its path in the request message and what is wrong with it."""

    field: str
    description: str


class SloServeError(Exception):
    """An error a caller is told about: a reason, a sentence, and details that are protobuf messages."""

    def __init__(
        self,
        reason: Reason,
        text: str,
        *,
        retry_after_ms: float | None = None,
        details: tuple[message.Message, ...] = (),
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.retry_after_ms = retry_after_ms
        self.details = details
        self.metadata = metadata or {}

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code of the reason."""
        return _CODES[self.reason]


class InvalidRequestError(SloServeError):
    """Malformed input: INVALID_ARGUMENT with one violation per field."""

    def __init__(self, *violations: FieldViolation) -> None:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        super().__init__(Reason.INVALID_FIELD, text)
        self.violations = violations


def to_status(error: SloServeError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error, details packed."""
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=error.metadata)
    details: list[message.Message] = [info]
    if isinstance(error, InvalidRequestError):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
            for v in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(round(error.retry_after_ms * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details.extend(error.details)
    packed = []
    for detail in details:
        if isinstance(detail, any_pb2.Any):  # forwarded from another service, packed already
            packed.append(detail)
            continue
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    return status_pb2.Status(code=error.code.value[0], message=error.text, details=packed)


def pushback_trailer(error: SloServeError) -> tuple[tuple[str, str], ...]:
    """The `grpc-retry-pushback-ms` trailer of an error that names a delay."""
    if error.retry_after_ms is None:
        return ()
    return (("grpc-retry-pushback-ms", str(max(0, round(error.retry_after_ms)))),)


def _text_of(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return (details() if callable(details) else None) or str(error)


def from_rpc_error(error: grpc.RpcError, fallback: Reason = Reason.INTERNAL) -> SloServeError:
    """The typed error behind a failed call to another service.

    `fallback` is the reason where the call carries none of ours, such as a refused connection: the caller knows whom
    it was talking to.
    """
    status = rpc_status.from_call(cast("grpc.Call", error))
    if status is None or status.code == code_pb2.OK:
        return SloServeError(fallback, _text_of(error))
    reason, retry_after_ms, rest = fallback, None, []
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info):
            reason = Reason(info.reason) if info.reason in Reason.__members__ else fallback
            metadata = dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMicroseconds() / 1000
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
        else:
            rest.append(detail)
    if violations:
        return InvalidRequestError(*violations)
    return SloServeError(reason, status.message, retry_after_ms=retry_after_ms, details=tuple(rest), metadata=metadata)
