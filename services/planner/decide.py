"""Which calls are decided together.

Calls that come in while a plan runs wait for the next one and share it. There is no timer: the first call to arrive at
an idle replica is decided as soon as the event loop has taken in what came with it.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from protos import planner_pb2
from services.common.errors import Reason, SloServeError
from services.planner.candidates import Candidate
from services.planner.promises import Promises

__all__ = ["Decided", "Decider"]

_MAX_TURNS = 16


@dataclass(frozen=True, slots=True)
class Decided:
    """The answer to one call, and what its `plan` span says."""

    verdicts: tuple[planner_pb2.CandidateVerdict, ...]
    running: int
    decided_together: int
    decision_ms: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    candidates: Sequence[Candidate]
    answer: "asyncio.Future[Decided]"


class Decider:
    """Answers Admit calls about one replica."""

    def __init__(self, promises: Promises) -> None:
        self._promises = promises
        self._waiting: list[_Waiting] = []

    async def admit(self, candidates: Sequence[Candidate]) -> Decided:
        """Decide on candidates, together with those of the other calls that are waiting.

        An attempt older than one already known raises `SloServeError` (STATE_INVALID) and changes nothing.
        """
        self._refuse_stale(candidates)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Decided] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._when_quiet, loop, 0)
        self._waiting.append(_Waiting(candidates, answer))
        return await answer

    def _refuse_stale(self, candidates: Sequence[Candidate]) -> None:
        waiting = {c.prefill.id: c.attempt for call in self._waiting for c in call.candidates}
        for candidate in candidates:
            request_id = candidate.prefill.id
            known = max(self._promises.ledger.attempt(request_id), waiting.get(request_id, 0))
            if candidate.attempt < known:
                text = f"attempt {candidate.attempt} of request {request_id} is stale: attempt {known} is known"
                raise SloServeError(Reason.STATE_INVALID, text)
            if waiting.setdefault(request_id, candidate.attempt) != candidate.attempt:
                raise SloServeError(Reason.STATE_INVALID, f"two attempts of request {request_id} are asked at once")

    def _when_quiet(self, loop: asyncio.AbstractEventLoop, seen: int, turns: int = 0) -> None:
        """Decide after a turn of the event loop that brought no further call (or after a bounded number of turns)."""
        if len(self._waiting) > seen and turns < _MAX_TURNS:
            loop.call_soon(self._when_quiet, loop, len(self._waiting), turns + 1)
        else:
            self._decide_waiting()

    def _decide_waiting(self) -> None:
        batch, self._waiting = self._waiting, []
        batch = [call for call in batch if not call.answer.done()]  # a cancelled call reserves nothing
        try:
            answers = self._answers(batch)
        except Exception as error:  # every waiting call is told
            for call in batch:
                call.answer.set_exception(error)
            return
        for call, answer in zip(batch, answers, strict=True):
            call.answer.set_result(answer)

    def _answers(self, batch: Sequence[_Waiting]) -> list[Decided]:
        asked = {candidate.key: candidate for call in batch for candidate in call.candidates}
        running = self._promises.ledger.running
        started_s = time.perf_counter()
        found = self._promises.decide(asked.values())
        decision_ms = (time.perf_counter() - started_s) * 1000
        return [
            Decided(tuple(found[c.key] for c in call.candidates), running, len(asked), decision_ms) for call in batch
        ]
