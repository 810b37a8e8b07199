"""Requests that wait for their verdict in the engine: asked about before every batch, decided in time.

Theory of operation. A pending request stands on its tier without a promise. Before a batch is formed the core decides
all of them together with what is promised; those it does not keep are set aside *for this batch*, because a later one
may have room. A verdict falls (`services.core.verdict`) when a plan holds a cheap prompt, when a prefill starts, with
the first token at the latest, or when a request has become hopeless. One that starts although no plan held it (the
engine had nothing else to do) has lost its chance: it runs as best effort.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.core.admission import Decision, Policy, decide
from services.core.constraint import FITS, Constraint
from services.core.quote import retry_delays_s
from services.core.retry import AT_ONCE_S
from services.core.slo import VerdictMode
from services.core.verdict import VerdictKind, verdict_at_first_token, verdict_for
from services.core.view import PlanSettings, Prefill, ReplicaView
from services.worker.hook_request import TrackedRequest

__all__ = ["Decided", "PendingRequests"]


@dataclass(frozen=True, slots=True)
class Decided:
    """The verdict on a request. `retry_after_s`: how much later the same SLO would fit, 0 where that is not known."""

    request: TrackedRequest
    admitted: bool
    predicted_ttft_s: float
    predicted_tpot_s: float
    constraint: Constraint
    retry_after_s: float = 0.0


class PendingRequests:
    """The undecided requests of one engine. It says what a verdict is; the hook puts it into effect."""

    def __init__(self, policy: Policy, early_prompt_tokens: int) -> None:
        self._policy = policy
        self._early_prompt_tokens = early_prompt_tokens
        self._requests: dict[str, TrackedRequest] = {}
        self._decisions: dict[str, Decision] = {}
        self._decided: list[Decided] = []
        self.set_aside: set[str] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: TrackedRequest) -> None:
        """A request waits for its verdict."""
        self._requests[request.key] = request

    def discard(self, request: TrackedRequest) -> None:
        """It is decided, or gone."""
        if self._requests.pop(request.key, None) is not None:
            self._decisions.pop(request.key, None)
            self.set_aside.discard(request.key)

    def ask(self, view: ReplicaView, settings: PlanSettings) -> list[tuple[TrackedRequest, VerdictKind]]:
        """Ask the core about all of them; the verdict each has now. `view` has them without a promise."""
        self._decisions = dict(decide(view, (), self._policy, settings).by_id)
        self.set_aside = {key for key, decision in self._decisions.items() if not decision.admitted}
        verdicts = [
            (self._requests[prefill.id], self._verdict(prefill, starting=False))
            for prefill in view.prefills
            if prefill.id in self._requests
        ]
        declined = {request.key for request, verdict in verdicts if verdict is VerdictKind.DECLINED}
        retry_s = self._retry_delays_s(view, settings, declined) if declined else {}
        for request, verdict in verdicts:
            if verdict is not VerdictKind.PENDING:
                self._note(request, verdict is VerdictKind.ADMITTED, retry_s.get(request.key, 0.0))
        return verdicts

    def starting(self, request: TrackedRequest, prefill: Prefill) -> VerdictKind:
        """The verdict on a request whose prefill starts in the batch that was just scheduled."""
        verdict = self._verdict(prefill, starting=True)
        if verdict is VerdictKind.PENDING and request.terms.verdict_mode is not VerdictMode.LATE:
            verdict = VerdictKind.DECLINED
        if verdict is not VerdictKind.PENDING:
            self._note(request, verdict is VerdictKind.ADMITTED)
        return verdict

    def first_token(self, request: TrackedRequest, prefill: Prefill, at_s: float) -> VerdictKind:
        """The verdict on a request that is still pending when its first token is out."""
        verdict = verdict_at_first_token(prefill, at_s)
        tpot_s = self._decisions[request.key].predicted_tpot_s if request.key in self._decisions else math.nan
        admitted = verdict is VerdictKind.ADMITTED
        self._decided.append(Decided(request, admitted, at_s - prefill.arrival_s, tpot_s, FITS))
        return verdict

    def take_decided(self) -> list[Decided]:
        """The verdicts since the last call."""
        taken, self._decided = self._decided, []
        return taken

    def _verdict(self, prefill: Prefill, *, starting: bool) -> VerdictKind:
        decision = self._decisions.get(prefill.id)
        if decision is None:  # never asked about: it came in and started without a plan in between
            return VerdictKind.PENDING
        mode = self._requests[prefill.id].terms.verdict_mode
        return verdict_for(mode, prefill, decision, starting=starting, early_prompt_tokens=self._early_prompt_tokens)

    def _note(self, request: TrackedRequest, admitted: bool, retry_after_s: float = 0.0) -> None:
        found = self._decisions.get(request.key)
        if found is None:
            self._decided.append(Decided(request, admitted, math.nan, math.nan, FITS))
            return
        ttft_s, tpot_s = found.predicted_ttft_s, found.predicted_tpot_s
        self._decided.append(Decided(request, admitted, ttft_s, tpot_s, found.constraint, retry_after_s))

    def _retry_delays_s(self, view: ReplicaView, settings: PlanSettings, declined: set[str]) -> dict[str, float]:
        """When the same SLOs, asked for anew, would fit; without those that never would."""
        anew = list(_asked_anew(view, declined))
        rest = view.with_prefills([prefill for prefill in view.prefills if prefill.id not in declined])
        delays_s = retry_delays_s(rest, anew, self._policy, settings)
        return {key: max(AT_ONCE_S, delay_s) for key, delay_s in delays_s.items() if math.isfinite(delay_s)}


def _asked_anew(view: ReplicaView, keys: set[str]) -> Iterator[Prefill]:
    for prefill in view.prefills:
        if prefill.id in keys and math.isfinite(prefill.arrival_s):
            yield replace(prefill, deadline_s=view.now_s + prefill.deadline_s - prefill.arrival_s)
