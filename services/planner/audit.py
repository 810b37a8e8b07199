"""What became of promises: counted by application and cause; finished lengths feed the forecast."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protos import planner_pb2
from services.core.lengths import LengthForecaster

__all__ = ["Auditor", "Outcome"]

_FAILED = "failed"
_CAUSES = frozenset({"ttft", "tpot", _FAILED})


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one promise ended. `cause` is empty for a kept one, else what was missed."""

    application: str
    kept: bool
    cause: str


class Auditor:
    """Learns from finished requests. `on_outcome` is told about every promise that ended."""

    def __init__(self, lengths: LengthForecaster, on_outcome: Callable[[Outcome], None]) -> None:
        self._lengths = lengths
        self._on_outcome = on_outcome
        self._outcomes: Counter[Outcome] = Counter()

    @property
    def outcomes(self) -> Counter[Outcome]:
        """How many promises ended which way since the start. Read only."""
        return self._outcomes

    def finished(self, requests: Iterable[planner_pb2.FinishedLength]) -> None:
        """Take in requests that a replica has finished. A failed one says nothing about lengths."""
        for request in requests:
            if request.missed != _FAILED and request.output_tokens > 0:
                self._lengths.observe(request.application, request.prompt_tokens, request.output_tokens)
            if not request.promised:
                continue
            known = request.missed if request.missed in _CAUSES else "other"
            outcome = Outcome(request.application, request.met, "" if request.met else known)
            self._outcomes[outcome] += 1
            self._on_outcome(outcome)
