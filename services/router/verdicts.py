"""Verdicts the router gives itself: best effort, rejection, and that there is nobody to ask."""

import math
from collections.abc import Sequence

from protos import router_pb2, types_pb2
from services.common.errors import Reason, SloServeError
from services.core.slo import BEST_EFFORT

__all__ = [
    "best_effort",
    "earliest_retry_ms",
    "hopeless",
    "late_already",
    "nearest",
    "no_planner",
    "no_replica",
    "rejected",
    "verdict_word",
]

DEFAULT_RETRY_MS = 1000.0


def verdict_word(verdict: types_pb2.Verdict) -> str:
    """`admitted`, `best_effort`...: the word stored in Redis and on spans and metrics."""
    return types_pb2.VerdictKind.Name(verdict.kind).removeprefix("VERDICT_KIND_").lower()


def no_planner(stage: types_pb2.Stage, detail: str, now_us: int) -> types_pb2.Verdict:
    """The verdict of a hop whose planner did not answer."""
    constraint = types_pb2.Constraint(kind=types_pb2.CONSTRAINT_KIND_NO_PLANNER, detail=detail)
    return _of(types_pb2.VERDICT_KIND_BEST_EFFORT, stage, constraint, now_us)


def no_replica() -> SloServeError:
    """There is nobody to ask."""
    return SloServeError(Reason.NO_REPLICA, "no replica is ready", retry_after_ms=DEFAULT_RETRY_MS)


def nearest(hops: Sequence[router_pb2.Hop]) -> types_pb2.Verdict | None:
    """The refusal that came nearest to a promise: the earliest first token, else the first one asked."""

    def lateness(hop: router_pb2.Hop) -> tuple[bool, float]:
        silent = hop.verdict.constraint.kind in (
            types_pb2.CONSTRAINT_KIND_NO_PLANNER,
            types_pb2.CONSTRAINT_KIND_NO_STATE,
        )
        return (silent, hop.verdict.predicted_ttft_ms or math.inf)

    return min(hops, key=lateness).verdict if hops else None


def hopeless(hops: Sequence[router_pb2.Hop]) -> bool:
    """True where every replica said that the request would be late even alone: waiting cannot help."""
    kinds = {hop.verdict.constraint.kind for hop in hops}
    return kinds == {types_pb2.CONSTRAINT_KIND_HOPELESS}


def late_already(
    request: types_pb2.QueuedRequest, stage: types_pb2.Stage, alone_s: float, now_us: int
) -> types_pb2.Verdict | None:
    """The verdict on a request that took too long to get here to be in time even on an idle replica; None otherwise.

    `alone_s` is its prefill on the fastest replica. What is behind gets no further behind by asking planners about it.
    """
    left_s = (request.ttft_deadline_us - now_us) / 1e6
    if left_s >= alone_s:
        return None
    since_ms = (now_us - request.arrival_us) / 1000
    constraint = types_pb2.Constraint(
        kind=types_pb2.CONSTRAINT_KIND_HOPELESS,
        needed=alone_s,
        available=left_s,
        detail=f"hopeless: it took {since_ms:.1f} ms to the router, even alone the first token takes "
        f"{alone_s * 1000:.1f} ms more, its deadline leaves {left_s * 1000:.1f} ms",
    )
    verdict = _of(types_pb2.VERDICT_KIND_BEST_EFFORT, stage, constraint, now_us)
    verdict.retry_after_ms = max(1.0, since_ms)  # what is under way now is through by then
    verdict.predicted_ttft_ms = since_ms + alone_s * 1000
    return verdict


def earliest_retry_ms(hops: Sequence[router_pb2.Hop]) -> float:
    """When the first replica expects room, milliseconds from now; a second where none says."""
    known = [hop.verdict.retry_after_ms for hop in hops if hop.verdict.retry_after_ms > 0]
    return min(known, default=DEFAULT_RETRY_MS)


def best_effort(stage: types_pb2.Stage, hops: Sequence[router_pb2.Hop], asked: int, now_us: int) -> types_pb2.Verdict:
    """Run without a promise, for the reason of the nearest refusal. `asked` counts the offers made."""
    found = nearest(hops)
    verdict = _of(types_pb2.VERDICT_KIND_BEST_EFFORT, stage, found.constraint if found else None, now_us)
    verdict.hops = asked
    return verdict


def rejected(stage: types_pb2.Stage, hops: Sequence[router_pb2.Hop], asked: int, now_us: int) -> types_pb2.Verdict:
    """Not run at all; travels in the details of the error status."""
    found = nearest(hops)
    verdict = _of(types_pb2.VERDICT_KIND_REJECTED, stage, found.constraint if found else None, now_us)
    verdict.tier = ""
    verdict.hops = asked
    verdict.retry_after_ms = earliest_retry_ms(hops)
    if found is not None:
        verdict.predicted_ttft_ms = found.predicted_ttft_ms
        verdict.predicted_tpot_ms = found.predicted_tpot_ms
    return verdict


def _of(
    kind: types_pb2.VerdictKind.ValueType,
    stage: types_pb2.Stage,
    constraint: types_pb2.Constraint | None,
    now_us: int,
) -> types_pb2.Verdict:
    return types_pb2.Verdict(
        kind=kind,
        tier=BEST_EFFORT,
        ttft_slo_ms=stage.ttft_ms,
        tpot_slo_ms=stage.tpot_ms,
        constraint=constraint,
        decided_at_us=now_us,
    )
