"""Deciding candidates of one replica together.

Calls that come in while a plan runs wait for the next one and share it. There is no timer: the first call to arrive at
an idle replica is decided as soon as the event loop has taken in what came with it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from protos import planner_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.admission import Decision, Decisions, Policy, decide
from services.core.errors import CoreError
from services.core.quote import retry_delays_s
from services.core.slo import Tier
from services.core.view import PlanSettings, Prefill, ReplicaView
from services.planner.candidates import Candidate
from services.planner.history import Said
from services.planner.ledger import Ledger
from services.planner.verdicts import no_state_verdict, verdict_of

__all__ = ["Decided", "Decider", "PlanRun", "Planning"]

_MAX_TURNS = 16


@dataclass(frozen=True, slots=True)
class PlanRun:
    """One run of the core: what went in, what came out, how long it took."""

    replica_id: str
    view: ReplicaView
    candidates: tuple[Prefill, ...]
    policy: Policy
    settings: PlanSettings
    decisions: Decisions
    seconds: float


@dataclass(frozen=True, slots=True)
class Planning:
    """How every replica of this planner is planned. Each of `on_run` sees every run of the core."""

    tiers: tuple[Tier, ...]
    policy: Policy
    settings: PlanSettings
    on_run: tuple[Callable[[PlanRun], None], ...]


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

    def __init__(self, ledger: Ledger, clock: Clock, planning: Planning) -> None:
        self.ledger = ledger
        self.clock = clock
        self.planning = planning
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

    def promote(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, types_pb2.Verdict]]:
        """Those of the waiting best-effort requests that now fit, with the promise each is given."""
        decisions = self.run([candidate.prefill for candidate in candidates]).by_id
        promoted = []
        for candidate in candidates:
            decision = decisions[candidate.prefill.id]
            if decision.admitted:
                verdict = self.verdict(candidate, decision)
                self.ledger.reserve(candidate.attempt, candidate.prefill, verdict, promotes=True)
                self._remember(candidate, verdict)
                promoted.append((candidate, verdict))
        return promoted

    def _refuse_stale(self, candidates: Sequence[Candidate]) -> None:
        waiting = {c.prefill.id: c.attempt for call in self._waiting for c in call.candidates}
        for candidate in candidates:
            request_id = candidate.prefill.id
            known = max(self.ledger.attempt(request_id), waiting.get(request_id, 0))
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
        running = self.ledger.running
        started_s = time.perf_counter()
        verdicts = self._decide(asked)
        decision_ms = (time.perf_counter() - started_s) * 1000
        return [
            Decided(tuple(verdicts[c.key] for c in call.candidates), running, len(asked), decision_ms) for call in batch
        ]

    def _decide(self, asked: dict[tuple[str, int], Candidate]) -> dict[tuple[str, int], planner_pb2.CandidateVerdict]:
        verdicts: dict[tuple[str, int], planner_pb2.CandidateVerdict] = {}
        fresh: list[Candidate] = []
        for key, candidate in asked.items():
            known = self._known(key)
            if known is None:
                fresh.append(candidate)
            else:
                verdicts[key] = known
        if not fresh:
            return verdicts
        if not self.ledger.ready:
            why = self.ledger.why_not_ready
            for candidate in fresh:
                verdict = no_state_verdict(candidate, why, self.clock)
                verdicts[candidate.key] = self._answer(candidate, verdict, 0)
            return verdicts
        decisions = self.run([candidate.prefill for candidate in fresh]).by_id
        for candidate in fresh:
            verdicts[candidate.key] = self._conclude(candidate, decisions[candidate.prefill.id])
        self._add_retry_delays([c.prefill for c in fresh if not decisions[c.prefill.id].admitted], verdicts.values())
        return verdicts

    def _add_retry_delays(self, declined: Sequence[Prefill], verdicts: Iterable[planner_pb2.CandidateVerdict]) -> None:
        """Say when each declined request would fit, out of one plan that has the new promises in it."""
        if not declined:
            return
        view = self.ledger.view(asked_ids=frozenset(prefill.id for prefill in declined))
        delays_s = retry_delays_s(view, declined, self.planning.policy, self.planning.settings)
        for answer in verdicts:
            delay_s = delays_s.get(answer.request_id, math.inf)
            answer.verdict.retry_after_ms = delay_s * 1000 if math.isfinite(delay_s) else 0.0

    def run(self, prefills: Sequence[Prefill]) -> Decisions:
        """Ask the core about prefills on top of everything in the ledger."""
        view = self.ledger.view(asked_ids=frozenset(prefill.id for prefill in prefills))
        policy, settings = self.planning.policy, self.planning.settings
        started_s = time.perf_counter()
        try:
            decisions = decide(view, prefills, policy, settings)
        except CoreError as error:
            raise SloServeError(Reason.STATE_INVALID, f"replica {self.ledger.replica_id}: {error}") from error
        seconds = time.perf_counter() - started_s
        run = PlanRun(self.ledger.replica_id, view, tuple(prefills), policy, settings, decisions, seconds)
        for watch in self.planning.on_run:
            watch(run)
        return decisions

    def verdict(self, candidate: Candidate, decision: Decision) -> types_pb2.Verdict:
        """The verdict that a decision means for a candidate."""
        return verdict_of(
            candidate, decision, replica_id=self.ledger.replica_id, tiers=self.planning.tiers, clock=self.clock
        )

    def _known(self, key: tuple[str, int]) -> planner_pb2.CandidateVerdict | None:
        """The promise this attempt already has. One that got none is decided anew: it may be offered again."""
        reservation = self.ledger.reservation(key)
        if reservation is not None:
            until_us = self.clock.to_unix_us(reservation.expires_s)
            return planner_pb2.CandidateVerdict(
                request_id=key[0], attempt=key[1], verdict=reservation.verdict, reserved_until_us=until_us
            )
        said = self.ledger.history.get(key[0])
        if said is not None and said.attempt == key[1] and self.ledger.holds(key):
            return planner_pb2.CandidateVerdict(request_id=key[0], attempt=key[1], verdict=said.verdict)
        return None

    def _conclude(self, candidate: Candidate, decision: Decision) -> planner_pb2.CandidateVerdict:
        verdict = self.verdict(candidate, decision)
        until_us = 0
        if decision.admitted:
            until_us = self.ledger.reserve(candidate.attempt, candidate.prefill, verdict)
        return self._answer(candidate, verdict, until_us)

    def _answer(self, candidate: Candidate, verdict: types_pb2.Verdict, until_us: int) -> planner_pb2.CandidateVerdict:
        self._remember(candidate, verdict)
        return planner_pb2.CandidateVerdict(
            request_id=candidate.prefill.id, attempt=candidate.attempt, verdict=verdict, reserved_until_us=until_us
        )

    def _remember(self, candidate: Candidate, verdict: types_pb2.Verdict) -> None:
        said = Said(candidate.attempt, verdict, candidate.prefill.deadline_s)
        self.ledger.history.remember(candidate.prefill.id, said)
