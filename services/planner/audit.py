"""What became of promises: counted by application and cause; finished lengths feed the forecast.

| cause       | the promise broke because                                                                   |
|-------------|---------------------------------------------------------------------------------------------|
| `failed`    | the request failed or its engine did                                                        |
| `unplanned` | this planner never made it: it has restarted since, or the replica was another's            |
| `lapsed`    | its reservation ran out before the engine had it, so that its place was given away          |
| `queue`     | it reached the engine only after its first token was due                                    |
| `engine`    | the engine had it in time and still was late: batches lasted longer, or more came, than planned |
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from protos import planner_pb2
from services.core.floors import AttainmentFloors
from services.core.lengths import LengthForecaster
from services.planner.history import Said, VerdictHistory

__all__ = ["Auditor", "Cause", "Outcome", "cause_of"]

_FAILED = "failed"
_MISSES = frozenset({"ttft", "tpot", _FAILED})


class Cause(StrEnum):
    """Why a promise broke."""

    NONE = ""
    FAILED = "failed"
    UNPLANNED = "unplanned"
    LAPSED = "lapsed"
    QUEUE = "queue"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one promise ended. `missed` is empty for a kept one, else `ttft`, `tpot`, `failed` or `other`."""

    application: str
    kept: bool
    missed: str
    cause: Cause


class Auditor:
    """Learns from finished requests. `on_outcome` is told about every promise that ended."""

    def __init__(
        self, lengths: LengthForecaster, floors: AttainmentFloors, on_outcome: Callable[[Outcome], None]
    ) -> None:
        self._lengths = lengths
        self._floors = floors
        self._on_outcome = on_outcome

    def finished(self, requests: Iterable[planner_pb2.FinishedLength], history: VerdictHistory) -> None:
        """Take in requests that a replica has finished. A failed one says nothing about lengths or load."""
        for request in requests:
            if request.missed != _FAILED and request.output_tokens > 0:
                self._lengths.observe(request.application, request.prompt_tokens, request.output_tokens)
                self._floors.observe(request.application, request.met)
            if not request.promised:
                continue
            if request.met:
                outcome = Outcome(request.application, True, "", Cause.NONE)
            else:
                missed = request.missed if request.missed in _MISSES else "other"
                cause = cause_of(missed, history.get(request.request_id))
                outcome = Outcome(request.application, False, missed, cause)
            self._on_outcome(outcome)


def cause_of(missed: str, said: Said | None) -> Cause:
    """Why a promise broke, from what was missed and what the planner had said."""
    if missed == _FAILED:
        return Cause.FAILED
    if said is None or not said.admitted:
        return Cause.UNPLANNED
    if said.lapsed:
        return Cause.LAPSED
    return Cause.QUEUE if missed == "ttft" and said.seen_s > said.deadline_s else Cause.ENGINE
