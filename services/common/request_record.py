"""What Redis says about one request, as values."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BeginResult", "CancelResult", "Enqueued", "RequestRecord", "RequestState", "record_from_fields"]


class RequestState(StrEnum):
    """Where a request stands. `new` is known but not queued; the last three are ends."""

    NEW = "new"
    QUEUED = "queued"
    CLAIMED = "claimed"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """True where nothing will happen to the request any more."""
        return self in (RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED)


class BeginResult(StrEnum):
    """Outcome of registering a request id: new, a retry of the same request, or taken by another one."""

    NEW = "NEW"
    SAME = "SAME"
    CONFLICT = "CONFLICT"


@dataclass(frozen=True, slots=True)
class Enqueued:
    """Where an attempt waits. `fresh` is False where it had been appended before: then that append counts."""

    stream: str
    entry_id: str
    fresh: bool


@dataclass(frozen=True, slots=True)
class CancelResult:
    """What a cancel met: the state before it (None: no such request), and who held the request."""

    previous: RequestState | None
    replica_id: str = ""
    attempt: int = 0
    owner: str = ""

    @property
    def cancelled(self) -> bool:
        """True where this cancel ended the request."""
        return self.previous is not None and not self.previous.ended


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One `slos:req:{id}` hash. `fields` has everything in it, as text; `times_us` its `*_us` fields as integers.

    `losses` counts the workers that died while they had it.
    """

    request_id: str
    state: RequestState
    attempt: int
    owner: str
    tier: str
    replica_id: str
    stream: str
    entry_id: str
    admission_id: str
    tenant: str
    application: str
    digest: str
    verdict: str
    traceparent: str
    losses: int
    times_us: Mapping[str, int]
    fields: Mapping[str, str]


def record_from_fields(request_id: str, raw: Mapping[bytes, bytes]) -> RequestRecord:
    """The record of a hash as Redis returns it."""
    fields = {name.decode(): value.decode("utf-8", "replace") for name, value in raw.items()}
    return RequestRecord(
        request_id=request_id,
        state=RequestState(fields["state"]),
        attempt=int(fields["attempt"]),
        owner=fields.get("owner", ""),
        tier=fields.get("tier", ""),
        replica_id=fields.get("replica", ""),
        stream=fields.get("stream", ""),
        entry_id=fields.get("entry", ""),
        admission_id=fields.get("admission", ""),
        tenant=fields.get("tenant", ""),
        application=fields.get("app", ""),
        digest=fields.get("digest", ""),
        verdict=fields.get("verdict", ""),
        traceparent=fields.get("traceparent", ""),
        losses=int(fields.get("losses", "0")),
        times_us={name: int(value) for name, value in fields.items() if name.endswith("_us") and value.isdigit()},
        fields=fields,
    )
