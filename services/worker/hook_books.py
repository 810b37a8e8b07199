"""What runs in one engine, as the scheduler hook keeps the books: membership, promises, batches in flight.

Theory of operation. `scheduler.py` calls `arrived`, `preempted` and `removed` as the engine's membership changes. After
a step was scheduled, `scheduled` books it as in flight; when its output is back, `completed`, `verified` and `observed`
turn predictions into facts. Everything is counted at schedule time, in flight included, so one batch in flight and two
are the same code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.core.admission import Policy
from services.core.pace import BestEffortPace
from services.core.pausing import PauseRule
from services.core.perf_model import BatchShape, PerfModel, attended
from services.core.slo import BEST_EFFORT
from services.core.verdict import EARLY_PROMPT_TOKENS, VerdictKind
from services.core.view import Prefill
from services.worker.decoder_table import DecoderTable
from services.worker.hook_config import ATTAINMENT_FLOOR
from services.worker.hook_hold import FirstTokenHold
from services.worker.hook_outcomes import Outcomes
from services.worker.hook_pauses import Pauses
from services.worker.hook_pending import Decided, PendingRequests
from services.worker.hook_request import TierNames, TrackedRequest
from services.worker.hook_speculation import Speculation
from services.worker.hook_steering import Progress, Verified
from services.worker.step_timer import StepTimer

__all__ = ["Books"]


@dataclass(frozen=True, slots=True)
class _Step:
    first_tokens: tuple[TrackedRequest, ...]


class Books:
    """State of one engine as its scheduler sees it."""

    def __init__(
        self,
        model: PerfModel | None,
        max_num_seqs: int,
        now_s: float,
        *,
        lapse_s: float,
        policy: Policy = Policy.MH,
        early_prompt_tokens: int = EARLY_PROMPT_TOKENS,
        attainment_floor: float = ATTAINMENT_FLOOR,
        max_verify: int = 1,
        hold_first_token: bool = False,
        pausing: bool = True,
    ) -> None:
        self.timer = StepTimer(model)
        self.table = DecoderTable(max_num_seqs)
        self.prefilling: dict[str, TrackedRequest] = {}
        self.pending = PendingRequests(policy, early_prompt_tokens)
        self.pace = BestEffortPace()
        self.pauses = Pauses(PauseRule() if pausing else None)
        self.outcomes = Outcomes(attainment_floor)
        self.speculation = Speculation(max_verify)
        self.hold = FirstTokenHold(hold_first_token)
        self.demoted: list[Decided] = []  # promises that were lost since the last report
        self.waiting_count = 0
        self.changed: dict[str, TrackedRequest] = {}
        self.gone: list[int] = []
        self.preemptions = 0
        self.probe_budget: int | None = None
        self.reorder = False
        self._probes: set[str] = set()
        self._tiers = TierNames()
        self._promised = 0
        self._last_promise_s = now_s - 2 * lapse_s
        self._steps: list[_Step] = []
        self._staged: dict[str, TrackedRequest] = {}

    # Membership

    def tier_of(self, request: TrackedRequest) -> int:
        """Index of the request's tier now; -1 without a promise."""
        return self._tiers.index(request.tier_name)

    def tier_name(self, tier: int) -> str:
        """Name of a tier that views of this hook use."""
        return self._tiers.name(tier)

    def arrived(self, request: TrackedRequest, now_s: float) -> None:
        """A request is in the engine's queue."""
        self.changed[request.key] = request
        if request.promised:
            self._promised += 1
        if request.pending:
            self.pending.add(request)
        if request.on_tier:
            self._last_promise_s = now_s
        elif now_s < request.terms.ttft_deadline_s < math.inf:  # it asked for a promise and got none
            self.pace.conflict(now_s)
        probe = request.terms.probe
        if probe is not None:
            self._probes.add(request.key)
            self.probe_budget = probe.budget if len(self._probes) == probe.requests else 0

    def promote(self, request: TrackedRequest, tier: str, now_s: float) -> None:
        """A request has a promise from now on."""
        if request.promised or tier == BEST_EFFORT:
            return
        self.pending.discard(request)
        request.promote(tier)
        self._promised += 1
        self._last_promise_s = now_s
        self._moved(request)

    def reforecast(self, request: TrackedRequest, output_tokens: int) -> None:
        """Expect a request to produce `output_tokens` in all."""
        request.reforecast(output_tokens)
        if request.decoding:
            self.table.reforecast(request)
        self.changed[request.key] = request

    def _demote(self, request: TrackedRequest) -> None:
        """A request has no promise, and will have none."""
        self.pending.discard(request)
        self.pauses.discard(request)
        request.demote()
        self._moved(request)

    def _settle(self, request: TrackedRequest, verdict: VerdictKind, now_s: float) -> None:
        if verdict is VerdictKind.ADMITTED:
            self.promote(request, request.tier_name, now_s)
        elif verdict is VerdictKind.DECLINED:
            self.outcomes.lost(request)
            self.pace.conflict(now_s)
            self._demote(request)

    def preempted(self, request: TrackedRequest) -> None:
        """The engine took the request's KV blocks; it waits again, its computed tokens lost."""
        self._leave(request)
        request.computed_tokens = 0
        request.started = False
        self.preemptions += 1
        self.changed[request.key] = request

    def paused(self, request: TrackedRequest) -> None:
        """A promised request was preempted because it is ahead: it waits unseen until it must or may go on."""
        self.pauses.pause(request)

    def removed(self, request: TrackedRequest, finished_s: float | None) -> None:
        """The request produced its last token at `finished_s`; None where it was aborted or failed."""
        self._leave(request)
        if finished_s is not None:
            self._first_token(request, finished_s)
            self.outcomes.ended(request, finished_s)
        self.hold.discard(request)
        self.changed.pop(request.key, None)
        self._staged.pop(request.key, None)
        self.gone.append(request.number)
        self.pending.discard(request)
        self.pauses.discard(request)
        if request.promised:
            self._promised -= 1
        self._probes.discard(request.key)
        if not self._probes:
            self.probe_budget = None

    def _leave(self, request: TrackedRequest) -> None:
        self.prefilling.pop(request.key, None)
        if request.decoding:
            self.table.remove(request)

    def _moved(self, request: TrackedRequest) -> None:
        """Tier or stage changed."""
        self.changed[request.key] = request
        self.reorder = self.reorder or request.started
        if request.decoding:
            self.table.refresh(request, self.tier_of(request))

    # Steps

    def scheduled(
        self, now_s: float, moved: Sequence[Progress], scheduled_keys: dict[str, int], draft_steps: int = 0
    ) -> None:
        """A step was scheduled: `moved` are its prefills, the rest of `scheduled_keys` decoding requests.

        Of a decoder's tokens only one is certain; what else the step yields is booked by `verified`.
        """
        table = self.table
        rows: slice | NDArray[np.bool_] = slice(None)
        if len(scheduled_keys) < len(table) + len(moved):  # not every decoder is in it
            rows = np.fromiter((key in scheduled_keys for key in table.keys), np.bool_, len(table))
        context = int(table.ints("context")[rows].sum())
        context += sum(p.computed_tokens - p.scheduled_tokens for p in moved)
        pairs = sum(attended(p.computed_tokens - p.scheduled_tokens, p.scheduled_tokens) for p in moved)
        tokens = sum(scheduled_keys.values())
        shape = BatchShape(tokens, context, len(scheduled_keys), draft_steps, pairs) if tokens else None
        done_s = self.timer.started(now_s, shape)
        table.advance(rows)
        first = tuple(p.request for p in moved if self._prefill_moved(p, now_s, done_s))
        self._steps.append(_Step(first))

    def _prefill_moved(self, progress: Progress, now_s: float, done_s: float) -> bool:
        """Book a prefill chunk; True if it was the last and a first token is in flight."""
        request = progress.request
        self.changed[request.key] = request
        request.computed_tokens = progress.computed_tokens
        request.total_tokens = progress.total_tokens
        if not request.started:
            request.started = True
            request.scheduled_at_s = request.scheduled_at_s or now_s
            self.prefilling[request.key] = request
            self.pauses.discard(request)
            self.reorder = True
            if request.pending:
                verdict = self.pending.starting(request, self._prefill(request))
                self._settle(request, verdict, now_s)
        if progress.computed_tokens < progress.total_tokens:
            return False
        del self.prefilling[request.key]
        request.tokens += 1
        request.outputs += 1
        application = self.speculation.application(request.terms.application)
        self.table.add(request, self.tier_of(request), self.hold.expected_s(request, done_s), application)
        self.reorder = True
        if request.multi_stage:
            self._staged[request.key] = request
        return True

    def completed(self, now_s: float) -> None:
        """The oldest step in flight is done; call before the engine looks at its output."""
        self.timer.completed(now_s)

    def verified(self, steps: Sequence[Verified]) -> None:
        """What the drafts of the step just completed were worth; before `observed`."""
        rows = {key: row for row, key in enumerate(self.table.keys)}
        counts: dict[str, tuple[int, int]] = {}
        for request, allowed, accepted in steps:
            judged, kept = counts.get(request.terms.application, (0, 0))
            counts[request.terms.application] = judged + min(allowed, accepted + 1), kept + accepted
        self.speculation.observe(counts)
        more = [(request, accepted) for request, _, accepted in steps if accepted]
        decoding = [(rows[request.key], accepted) for request, accepted in more if request.key in rows]
        if decoding:
            self.table.accept([row for row, _ in decoding], [accepted for _, accepted in decoding])
        for request, accepted in more:
            if request.key not in rows:  # preempted or ended meanwhile, its output delivered all the same
                request.outputs += accepted
                request.tokens += accepted

    def observed(self, now_s: float) -> None:
        """The engine has taken the output of the oldest step in flight; requests that ended are gone already."""
        step = self._steps.pop(0)
        for request in step.first_tokens:
            self._first_token(request, now_s)
        if len(self.hold):
            for request in self.hold.release(now_s, wanted=self._prefill_on_tier()):
                if request.decoding:
                    self.table.refresh(request, self.tier_of(request))
                self.changed[request.key] = request
        for request in [r for r in self._staged.values() if r.stage_ended(now_s)]:
            if request.decoding:
                self.table.sync(request)
                request.enter_stage(now_s)
                self.table.restage(request, self.tier_of(request))
            else:  # preempted with the last token of the stage in flight
                request.enter_stage(now_s)
            self._moved(request)
            if not request.multi_stage:
                del self._staged[request.key]
        self.timer.set_busy(bool(len(self.table) or self.prefilling or self.waiting_count))

    def _first_token(self, request: TrackedRequest, now_s: float) -> None:
        """Book the first token if it is out and was not booked before."""
        if request.anchor_s is not None or not len(request.produced):
            return
        if request.pending:
            prefill = self._prefill(request)
            self._settle(request, self.pending.first_token(request, prefill, now_s), now_s)
        self.hold.first_token(request, now_s, wanted=self._prefill_on_tier())
        request.first_token(now_s)
        self.changed[request.key] = request
        if request.decoding:
            self.table.refresh(request, self.tier_of(request))

    def _prefill(self, request: TrackedRequest) -> Prefill:
        weight = self.outcomes.weight(request) if request.pending else 1
        return request.planned(weight, self.tier_of)

    def _prefill_on_tier(self) -> bool:
        """Whether anything with a promise, or that waits for one, is without its first token."""
        decoding = int(np.count_nonzero(self.table.ints("tier") >= 0))
        return self._promised + len(self.pending) > decoding
