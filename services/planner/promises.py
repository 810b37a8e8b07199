"""From candidates to verdicts on one replica: ask the core, reserve what it admits, explain what it does not."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from protos import planner_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.admission import Decision, Decisions, Policy, decide
from services.core.batch import form_batch
from services.core.constraint import ConstraintKind
from services.core.drafts import acceptance_by_tier
from services.core.duration_cap import DurationCap
from services.core.errors import CoreError
from services.core.quote import Quote, quote, retry_delays_s
from services.core.retry import AT_ONCE_S
from services.core.slo import Tier, VerdictMode
from services.core.speculation import PRIOR_ACCEPTANCE
from services.core.verdict import EARLY_PROMPT_TOKENS, VerdictKind, displaces, verdict_for
from services.core.view import PlanSettings, Prefill, ReplicaView
from services.planner.candidates import Candidate
from services.planner.history import Said
from services.planner.ledger import Ledger
from services.planner.slip import USUAL_TRANSIT_S, Slips, slip_s
from services.planner.verdicts import add_batch_ahead, no_state_verdict, verdict_of

__all__ = ["PlanRun", "Planning", "Promises"]

_HANDOVER_S = 0.002  # from the worker's submission to where the engine forms its batches
_SHORTEST_BATCH_S = 0.001
_MOST_TRIES = 4  # at a time
_MOST_UNDECIDED = 64  # likewise; more are a crowd that is not all in time
_LONGEST_WAYS = 0.5  # of what a request could wait if it took no time to the engine and back

Key = tuple[str, int]
Answers = dict[Key, planner_pb2.CandidateVerdict]


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
    """How every replica of this planner is planned. Each of `on_run` sees every run of the core.

    `settings` are those of a replica that says nothing else. A prompt of up to `early_prompt_tokens` is cheap.
    """

    tiers: tuple[Tier, ...]
    policy: Policy
    settings: PlanSettings
    on_run: tuple[Callable[[PlanRun], None], ...]
    early_prompt_tokens: int = EARLY_PROMPT_TOKENS


class Promises:
    """Makes promises about one replica and keeps them in its ledger."""

    def __init__(self, ledger: Ledger, clock: Clock, planning: Planning) -> None:
        self.ledger = ledger
        self.planning = planning
        self.clock = clock
        self._cap = DurationCap()
        self._turned_away = False  # somebody, for want of short batches, since that was last asked

    def decide(self, asked: Iterable[Candidate]) -> Answers:
        """A verdict on every candidate; a promise already made is repeated, everything else decided together."""
        answers: Answers = {}
        fresh: list[Candidate] = []
        for candidate in asked:
            known = self._known(candidate.key)
            if known is None:
                fresh.append(candidate)
            else:
                answers[candidate.key] = known
        if not self.ledger.ready:
            why = self.ledger.why_not_ready
            return answers | {c.key: self._answer(c, no_state_verdict(c, why, self.clock)) for c in fresh}
        slips = self._slips() if fresh else Slips()
        return answers | self._decide_fresh([c.less_slip(slips.safe_s) for c in fresh], slips)

    def promote(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, types_pb2.Verdict]]:
        """Those of the waiting best-effort requests that now fit, with the promise each is given."""
        decisions = self._run([candidate.prefill for candidate in candidates]).by_id
        promoted = []
        for candidate in candidates:
            decision = decisions[candidate.prefill.id]
            if decision.admitted:
                verdict = self._verdict(candidate, decision, VerdictKind.ADMITTED)
                self.ledger.reserve(candidate.attempt, candidate.prefill, verdict, promotes=True)
                self._wanted(candidate)
                self._remember(candidate, verdict)
                promoted.append((candidate, verdict))
        return promoted

    def quote(self, candidate: Candidate) -> tuple[Quote, types_pb2.Verdict]:
        """What the core quotes now, and the verdict it means. Reserves nothing; needs a ready ledger."""
        asked = candidate.less_slip(self._slips().safe_s)
        view = self.ledger.view(asked_ids=frozenset({candidate.prefill.id}))
        settings = self.settings((asked.prefill,))
        found = quote(view, asked.prefill, self.planning.tiers, self.planning.policy, settings)
        kind = VerdictKind.ADMITTED if found.fits else VerdictKind.DECLINED
        verdict = self._verdict(asked, found.decision, kind)
        return replace(found, tightest_ttft_s=found.tightest_ttft_s + asked.slip_s), verdict

    @property
    def caps_s(self) -> tuple[float, ...]:
        """The limits on a batch's duration, the default first, for the replica to execute and for plans about it."""
        model = self.ledger.perf_model
        if model is None:
            return self.planning.settings.caps_s
        return self._cap.caps_s(self.clock.now_s(), model, self.ledger.batches_in_flight)

    def settings(self, asked: Sequence[Prefill] = ()) -> PlanSettings:
        """How this replica is planned, as the engine runs it, while `asked` are candidates.

        Where the engine drafts tokens, with the acceptance to expect on each tier, and on a tier that is empty what
        the candidates would have there; the core chooses the lengths.
        """
        settings, drafts = self.planning.settings, self.ledger.drafts
        limit = self.ledger.max_batch_tokens or settings.max_batch_tokens
        settings = replace(settings, caps_s=self.caps_s, max_batch_tokens=limit)
        if not drafts.enabled:
            return settings
        rows = list(self.ledger.applications(frozenset(prefill.id for prefill in asked)))
        rows += [(prefill.tier, prefill.application) for prefill in asked]
        rates = np.array([drafts.rate(application) for _, application in rows], np.float64)
        otherwise = float(rates[-len(asked) :].mean()) if asked else PRIOR_ACCEPTANCE
        acceptance = acceptance_by_tier(
            np.array([tier for tier, _ in rows], np.int64), rates, len(self.planning.tiers), otherwise
        )
        return replace(settings, acceptance=acceptance, max_verify_tokens=drafts.max_verify_tokens)

    def take_turned_away(self) -> bool:
        """Whether somebody was declined, since this was last asked, only because batches of best effort are long."""
        turned_away, self._turned_away = self._turned_away, False
        return turned_away

    def _note_declined(self, candidate: Candidate, decision: Decision) -> None:
        """A first token that is hopeless behind a long batch of best effort, but not behind a short one, is wanted too.

        Or a replica full of best effort would decline them all: its batches are as long as the engine allows until
        there is a promise to keep.
        """
        ttft_s, model = candidate.slo.ttft_s, self.ledger.perf_model
        if ttft_s is None or model is None or decision.constraint.kind is not ConstraintKind.HOPELESS:
            return
        alone_s = model.zero_load_prefill_s(candidate.prefill.remaining_tokens)
        if self._cap.lapsed(self.clock.now_s()) and alone_s + self.caps_s[0] <= ttft_s:
            self._wanted(candidate)
            self._turned_away = True

    def _asked(self, candidate: Candidate) -> None:
        """Somebody wants its first token in time: the cap on batches follows how long such requests can wait.

        With one batch in flight the way to the engine is part of that time. With two the next batch is formed before
        such a request is there: it cannot wait for what its ways there and back take, though long ways do not make
        batches ever shorter.
        """
        ttft_s, model = candidate.slo.ttft_s, self.ledger.perf_model
        if ttft_s is not None and model is not None:
            now_s = self.clock.now_s()
            patience_s = max(0.0, ttft_s - model.zero_load_prefill_s(candidate.prefill.remaining_tokens))
            if self.ledger.batches_in_flight > 1:
                there_s = candidate.due_s - now_s - self.ledger.transit.median_s(now_s)
                patience_s -= min(max(0.0, ttft_s - there_s), _LONGEST_WAYS * patience_s)
            self._cap.asked(now_s, patience_s)

    def _wanted(self, candidate: Candidate) -> None:
        """A first token is to come in time: batches are to stay short."""
        if candidate.slo.ttft_s is not None:
            self._cap.promised(self.clock.now_s())

    def _slips(self) -> Slips:
        """How much later than planned a candidate decided now reaches the engine."""
        now_s, ledger = self.clock.now_s(), self.ledger
        transit = ledger.transit
        lately_s = transit.seconds(now_s)
        transits_s = (lately_s, transit.median_s(now_s), min(lately_s, USUAL_TRANSIT_S))
        safe_s, likely_s, usual_s = (seconds + _HANDOVER_S for seconds in transits_s)
        if ledger.batches_in_flight == 1 and ledger.engine_free_s >= now_s + safe_s:
            return Slips()  # it will be there when the next batch is formed
        settings = replace(self.settings(), cap_lapsed=self._cap.lapsed(now_s))
        view = ledger.view()
        due = [p for p in view.prefills if p.promised or p.tier < 0 or p.deadline_s > view.start_s]
        view = view.with_prefills(due)
        batch_s = form_batch(view, settings).duration_s
        if not ledger.running:  # what is on its way may come first, and run first
            return Slips(safe_s + batch_s, likely_s, usual_s + batch_s, batch_s)
        batch_s = max(_SHORTEST_BATCH_S, batch_s)
        decoding_s = max(_SHORTEST_BATCH_S, form_batch(view.with_prefills(()), settings).duration_s)
        safe_s, likely_s, usual_s = (
            slip_s(now_s, ledger.engine_free_s, transit_s, each_s, ledger.batches_in_flight)
            for transit_s, each_s in ((safe_s, batch_s), (likely_s, decoding_s), (usual_s, batch_s))
        )
        return Slips(safe_s, min(likely_s, safe_s), usual_s, batch_s)

    def _may_be_in_time(self, candidate: Candidate, decision: Decision, slips: Slips) -> bool:
        """Whether a request is hopeless only if its way takes as long as it hardly ever does.

        Then it waits for its verdict in the engine, which sees whether it is in time: what is likely, and the model
        without its margin, count. Where its way takes longer than usual lately, so that it is hopeless unless that
        ends, it is a try, and a few at a time are enough: what arrives tells how long the way is now. One bad moment
        would else be believed for as long as it is remembered.
        """
        constraint = decision.constraint
        if constraint.kind is not ConstraintKind.HOPELESS:
            return False
        firm = candidate.mode is VerdictMode.FIRM
        if not firm and self._likely(decision, slips):
            return self.ledger.undecided < _MOST_UNDECIDED
        if constraint.needed - constraint.available > slips.safe_s - slips.usual_s:
            return False
        self.ledger.transit.turned_away(self.clock.now_s())
        return not firm and self.ledger.tries < _MOST_TRIES

    def _likely(self, decision: Decision, slips: Slips) -> bool:
        """Whether a request that is hopeless on the safe side is in time if its way takes as long as half of them."""
        constraint, model = decision.constraint, self.ledger.perf_model
        margin_s = 0.0 if model is None else model.margin_s
        return constraint.needed - constraint.available <= slips.safe_s - slips.likely_s + margin_s

    def _decide_fresh(self, fresh: Sequence[Candidate], slips: Slips) -> Answers:
        if not fresh:
            return {}
        for candidate in fresh:
            self._asked(candidate)
        decisions = self._run([candidate.prefill for candidate in fresh]).by_id
        contended = displaces(decisions.values(), {candidate.prefill.id for candidate in fresh})
        answers: Answers = {}
        for candidate in fresh:
            decision = decisions[candidate.prefill.id]
            spare_s = candidate.prefill.deadline_s - decision.predicted_first_token_s
            sure = spare_s >= slips.batch_s
            early = self.planning.early_prompt_tokens if sure and not contended else 0
            kind = verdict_for(candidate.mode, candidate.prefill, decision, early_prompt_tokens=early)
            if kind is VerdictKind.DECLINED and self._may_be_in_time(candidate, decision, slips):
                kind = VerdictKind.PENDING
            if kind is not VerdictKind.DECLINED:
                verdict = self._verdict(candidate, decision, kind)
                promised = kind is VerdictKind.ADMITTED
                if not promised and decision.admitted and not sure:
                    add_batch_ahead(verdict, slips.batch_s, spare_s)
                held = candidate if promised else candidate.less_slip(slips.likely_s - candidate.slip_s)
                tried = decision.constraint.kind is ConstraintKind.HOPELESS and not self._likely(decision, slips)
                until_us = self.ledger.reserve(candidate.attempt, held.prefill, verdict, promised=promised, tried=tried)
                self._wanted(candidate)
                answers[candidate.key] = self._answer(candidate, verdict, until_us)
        declined = [candidate for candidate in fresh if candidate.key not in answers]
        delays_s = self._retry_delays_s(
            [_asked_anew(candidate, slips.safe_s - slips.usual_s, self.clock.now_s()) for candidate in declined]
        )
        for candidate in declined:
            verdict = self._verdict(candidate, decisions[candidate.prefill.id], VerdictKind.DECLINED)
            delay_s = delays_s[candidate.prefill.id]
            verdict.retry_after_ms = max(AT_ONCE_S, delay_s) * 1000 if math.isfinite(delay_s) else 0.0
            self._note_declined(candidate, decisions[candidate.prefill.id])
            answers[candidate.key] = self._answer(candidate, verdict)
        return answers

    def _retry_delays_s(self, declined: Sequence[Prefill]) -> dict[str, float]:
        """When each declined request, asked for anew, would fit, out of one plan that has the new promises in it."""
        if not declined:
            return {}
        view = self.ledger.view(asked_ids=frozenset(prefill.id for prefill in declined))
        return retry_delays_s(view, declined, self.planning.policy, self.settings(declined))

    def _run(self, prefills: Sequence[Prefill]) -> Decisions:
        """Ask the core about prefills on top of everything in the ledger."""
        view = self.ledger.view(asked_ids=frozenset(prefill.id for prefill in prefills))
        policy, settings = self.planning.policy, self.settings(prefills)
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

    def _known(self, key: Key) -> planner_pb2.CandidateVerdict | None:
        """The answer this attempt already has: a promise, or a place to wait. One that got neither is decided anew."""
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

    def _verdict(self, candidate: Candidate, decision: Decision, kind: VerdictKind) -> types_pb2.Verdict:
        expected = replace(decision, predicted_ttft_s=decision.predicted_ttft_s + candidate.slip_s)
        return verdict_of(
            candidate, expected, kind, replica_id=self.ledger.replica_id, tiers=self.planning.tiers, clock=self.clock
        )

    def _answer(
        self, candidate: Candidate, verdict: types_pb2.Verdict, until_us: int = 0
    ) -> planner_pb2.CandidateVerdict:
        self._remember(candidate, verdict)
        return planner_pb2.CandidateVerdict(
            request_id=candidate.prefill.id, attempt=candidate.attempt, verdict=verdict, reserved_until_us=until_us
        )

    def _remember(self, candidate: Candidate, verdict: types_pb2.Verdict) -> None:
        said = Said(candidate.attempt, verdict, candidate.due_s, self.clock.now_s())
        self.ledger.history.remember(candidate.prefill.id, said)


def _asked_anew(candidate: Candidate, excess_s: float, now_s: float) -> Prefill:
    """The same SLO asked for again: its whole time to first token lies ahead, and its way is as usual again."""
    prefill = candidate.prefill
    if not math.isfinite(prefill.arrival_s):
        return prefill
    return replace(prefill, arrival_s=now_s, deadline_s=now_s + prefill.deadline_s - prefill.arrival_s + excess_s)
