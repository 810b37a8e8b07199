"""A request as a stream entry: flat fields for people, and `body`, the protobuf that counts."""

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from protos import types_pb2

__all__ = ["ENTRY_VERSION", "MalformedEntryError", "decode_entry", "encode_entry"]

ENTRY_VERSION = "1"


class MalformedEntryError(ValueError):
    """A stream entry that is no request: no body, an undecodable one, or one without id or attempt."""


def encode_entry(request: types_pb2.QueuedRequest) -> dict[str, str | bytes]:
    """The fields of a request's entry."""
    return {
        "id": request.request_id,
        "app": request.application,
        "tenant": request.tenant,
        "tier": request.tier,
        "ttft_deadline_ms": str(request.ttft_deadline_us // 1000),
        "traceparent": request.traceparent,
        "tracestate": request.tracestate,
        "v": ENTRY_VERSION,
        "body": request.SerializeToString(),
    }


def decode_entry(fields: Mapping[bytes, bytes]) -> types_pb2.QueuedRequest:
    """The request of an entry's fields; raises MalformedEntryError."""
    version, body = fields.get(b"v", b""), fields.get(b"body")
    if version.decode("utf-8", "replace") != ENTRY_VERSION:
        raise MalformedEntryError(f"entry version {version!r} is not {ENTRY_VERSION}")
    if body is None:
        raise MalformedEntryError("entry without body")
    try:
        request = types_pb2.QueuedRequest.FromString(body)
    except DecodeError as error:
        raise MalformedEntryError(f"body is no QueuedRequest: {error}") from None
    if not request.request_id or request.attempt < 1:
        raise MalformedEntryError("body names no request or no attempt")
    return request
