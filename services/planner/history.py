"""What the planner last said about each request, and what became of the promise until the engine had it."""

import math
from collections import OrderedDict
from dataclasses import dataclass

from protos import types_pb2
from services.core.slo import BEST_EFFORT

__all__ = ["Said", "VerdictHistory"]

_MOST = 4096


@dataclass(slots=True)
class Said:
    """The last verdict on a request. Times are monotonic seconds.

    `decided_s`: when it was said.
    `lapsed`: its reservation ran out before the engine reported it, so that its place may have been given away.
    `seen_s`: when the engine first reported it after the verdict; infinite before.
    """

    attempt: int
    verdict: types_pb2.Verdict
    deadline_s: float
    decided_s: float = math.nan
    lapsed: bool = False
    seen_s: float = math.inf

    @property
    def taken(self) -> bool:
        """Whether it was sent to the engine at once, promised or to be decided there."""
        return self.admitted or self.verdict.kind == types_pb2.VERDICT_KIND_PENDING

    @property
    def admitted(self) -> bool:
        """Whether it was a promise."""
        return self.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED


class VerdictHistory:
    """The last few thousand verdicts of one replica, by request id."""

    def __init__(self) -> None:
        self._said: OrderedDict[str, Said] = OrderedDict()

    def remember(self, request_id: str, said: Said) -> None:
        """Keep a verdict in place of the one before it."""
        self._said[request_id] = said
        self._said.move_to_end(request_id)
        while len(self._said) > _MOST:
            self._said.popitem(last=False)

    def get(self, request_id: str) -> Said | None:
        """The last verdict; None if the request was never asked about, or long ago."""
        return self._said.get(request_id)

    def decided(self, request_id: str, attempt: int, *, promised: bool, tier: int) -> None:
        """The engine reports how a request stands; it is what decides a pending one. Tier -1 is best effort."""
        said = self._said.get(request_id)
        pending = said is not None and said.verdict.kind == types_pb2.VERDICT_KIND_PENDING and said.attempt == attempt
        if said is None or not pending or (not promised and tier >= 0):
            return
        verdict = types_pb2.Verdict()
        verdict.CopyFrom(said.verdict)
        verdict.kind = types_pb2.VERDICT_KIND_ADMITTED if promised else types_pb2.VERDICT_KIND_BEST_EFFORT
        verdict.tier = verdict.tier if promised else BEST_EFFORT
        if promised:
            verdict.ClearField("constraint")
        said.verdict = verdict

    def lapsed(self, request_id: str) -> None:
        """The reservation of the request has run out."""
        said = self._said.get(request_id)
        if said is not None:
            said.lapsed = True

    def seen(self, request_id: str, now_s: float) -> Said | None:
        """The engine reports the request; the verdict where this is the first time since."""
        said = self._said.get(request_id)
        if said is None or said.seen_s < math.inf:
            return None
        said.seen_s = now_s
        return said
