"""The scheduler hook's state and decisions, without vLLM: what runs, what each step may contain, what is reported.

Theory of operation. `scheduler.py` calls `arrived`, `preempted` and `removed` as the engine's membership changes.
Before a step it asks `reconsider` (verdicts on pending requests), `shortage` (best effort to preempt first) and
`steer`, which forms the batch with the core and says it as limits: tokens per request, and which waiting requests to
let in, in order. After the step was scheduled,
`scheduled` books it as in flight; when its output is back, `completed` and `observed` turn predictions into facts.
Everything is counted at schedule time, in flight included, so one batch in flight and two are the same code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.core.admission import Policy
from services.core.batch import form_batch
from services.core.duration_cap import caps_around
from services.core.perf_model import BatchShape, PerfModel
from services.core.slo import BEST_EFFORT
from services.core.verdict import EARLY_PROMPT_TOKENS, VerdictKind
from services.core.view import PlanSettings, ReplicaView
from services.core.warm import warm_up
from services.worker import hook_room
from services.worker.decoder_table import DecoderTable
from services.worker.hook_pending import PendingRequests
from services.worker.hook_request import TierNames, TrackedRequest
from services.worker.hook_room import admissible, blocks_to_finish, new_blocks
from services.worker.hook_steering import Pool, Progress, Shortage, Steering
from services.worker.step_timer import StepTimer

__all__ = ["Hook"]

_BEST_EFFORT_WINDOW = 32


@dataclass(frozen=True, slots=True)
class _Step:
    first_tokens: tuple[TrackedRequest, ...]


class Hook:
    """State of one engine as its scheduler sees it."""

    def __init__(
        self,
        settings: PlanSettings,
        model: PerfModel | None,
        lapse_s: float,
        max_num_seqs: int,
        now_s: float,
        policy: Policy = Policy.MH,
        early_prompt_tokens: int = EARLY_PROMPT_TOKENS,
    ) -> None:
        self.timer = StepTimer(model)
        self.table = DecoderTable(max_num_seqs)
        self.prefilling: dict[str, TrackedRequest] = {}
        self.pending = PendingRequests(policy, early_prompt_tokens)
        self.waiting_count = 0
        self.changed: dict[str, TrackedRequest] = {}
        self.gone: list[int] = []
        self.preemptions = 0
        self.probe_budget: int | None = None
        self._probes: set[str] = set()
        self.reorder = False
        self._settings = settings
        self._policy = policy
        self._default_caps_s = settings.caps_s
        self._lapse_s = lapse_s
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

    def _demote(self, request: TrackedRequest) -> None:
        """A pending request will have no promise."""
        self.pending.discard(request)
        request.demote()
        self._moved(request)

    def _settle(self, request: TrackedRequest, verdict: VerdictKind, now_s: float) -> None:
        if verdict is VerdictKind.ADMITTED:
            self.promote(request, request.tier_name, now_s)
        elif verdict is VerdictKind.DECLINED:
            self._demote(request)

    def preempted(self, request: TrackedRequest) -> None:
        """The engine took the request's KV blocks; it waits again, its computed tokens lost."""
        self._leave(request)
        request.computed_tokens = 0
        request.started = False
        self.preemptions += 1
        self.changed[request.key] = request

    def removed(self, request: TrackedRequest) -> None:
        """The request finished or was aborted."""
        self._leave(request)
        self.changed.pop(request.key, None)
        self._staged.pop(request.key, None)
        self.gone.append(request.number)
        self.pending.discard(request)
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
        self.reorder = True
        if request.decoding:
            self.table.refresh(request, self.tier_of(request))

    # Planning

    def warm_up(self) -> None:
        """Have the core's kernels compiled (or loaded) before the first step needs them."""
        warm_up(self._policy)

    def set_cap(self, seconds: float | None) -> None:
        """Cap the duration of batches, with longer ones tried on conflict; None restores the configured caps."""
        caps = self._default_caps_s if seconds is None else caps_around(seconds)
        self._settings = replace(self._settings, caps_s=caps)

    def planning(self, now_s: float) -> bool:
        """Whether steps are planned: there is a model, no profile is running, and promises are or were around."""
        if self.timer.model is None or self._probes:
            return False
        return self._promised > 0 or len(self.pending) > 0 or now_s - self._last_promise_s < self._lapse_s

    def considered(self, waiting: Sequence[TrackedRequest]) -> list[TrackedRequest]:
        """The waiting requests worth planning with: all promised or pending ones and the first of best effort."""
        on_tier = [request for request in waiting if request.on_tier]
        if len(on_tier) == len(waiting):
            return on_tier
        best_effort = (request for request in waiting if not request.on_tier)
        return on_tier + [request for request, _ in zip(best_effort, range(_BEST_EFFORT_WINDOW), strict=False)]

    def reconsider(self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> list[TrackedRequest]:
        """Ask about the pending requests; those of `waiting` that the next batch may start."""
        if not self.pending:
            return list(waiting)
        on_tier = [request for request in waiting if request.on_tier]
        view = self._view(now_s, on_tier, pool, [*self.prefilling.values()])
        for request, verdict in self.pending.ask(view, self._settings_now(now_s)):
            self._settle(request, verdict, now_s)
        return [request for request in waiting if request.key not in self.pending.set_aside]

    def steer(self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> Steering:
        """Form the next batch and say it as limits."""
        view = self._view(now_s, admissible(self.table, self.prefilling.values(), waiting, pool), pool)
        plan = form_batch(view, self._settings_now(now_s))
        if plan.token_budget == 0:
            return Steering(plan=plan)  # nothing the plan could place: let the engine try by itself rather than idle
        chunks = {chunk.id: chunk.tokens for chunk in (*plan.prefill, *plan.best_effort_prefill)}
        limits = dict.fromkeys(plan.skipped_ids, 0)
        for key in self.prefilling:
            limits[key] = chunks.get(key, 0)
        tiers = self.table.ints("tier")
        best_effort_rows = np.flatnonzero(tiers < 0)
        if len(best_effort_rows) > len(plan.best_effort_decode_ids):
            chosen = set(plan.best_effort_decode_ids)
            keys = self.table.keys
            limits.update((keys[row], 0) for row in best_effort_rows.tolist() if keys[row] not in chosen)
        admit = tuple(key for key in chunks if key not in self.prefilling)
        limits.update((key, chunks[key]) for key in admit)
        return Steering(limits, admit, plan.token_budget, plan)

    def crowded(self, waiting: Sequence[TrackedRequest], pool: Pool) -> bool:
        """Whether all promised work together could lack blocks or seats: a bound that is cheap to ask every step."""
        return hook_room.crowded(self.table, self.prefilling.values(), waiting, pool)

    def shortage(
        self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool, held_blocks: int
    ) -> Shortage | None:
        """What the next batch's promised work lacks while best effort holds `held_blocks`; None if nothing."""
        view = self._view(now_s, waiting, pool)
        view = replace(
            view,
            decoders=[decoder for decoder in view.decoders if decoder.tier >= 0],
            prefills=[prefill for prefill in view.prefills if prefill.tier >= 0],
            free_blocks=min(pool.total_blocks, pool.free_blocks + held_blocks),
        )
        plan = form_batch(view, self._settings_now(now_s))
        planned = {chunk.id for chunk in plan.prefill}
        starting = [request for request in waiting if request.key in planned]
        blocks = new_blocks(self.table, pool, promised_only=True)
        blocks += sum(blocks_to_finish(request, pool) for request in starting)
        blocks += sum(blocks_to_finish(request, pool) for request in self.prefilling.values() if request.promised)
        missing = Shortage(max(0, blocks - pool.free_blocks), max(0, len(starting) - pool.free_seats))
        return missing if missing.blocks or missing.seats else None

    def _view(
        self,
        now_s: float,
        waiting: Sequence[TrackedRequest],
        pool: Pool,
        started: Sequence[TrackedRequest] | None = None,
    ) -> ReplicaView:
        """What the core sees; of the started prefills by default those that are not set aside for this batch."""
        model = self.timer.model
        assert model is not None
        if started is None:
            aside = self.pending.set_aside
            started = [request for request in self.prefilling.values() if request.key not in aside]
        prefills = [request.prefill(self.tier_of(request)) for request in (*started, *waiting)]
        return ReplicaView(
            now_s,
            model,
            self.table.columns(),
            prefills,
            pool.free_blocks,
            pool.total_blocks,
            pool.block_size,
            pool.max_num_seqs,
            self.timer.free_at_s,
        )

    def _settings_now(self, now_s: float) -> PlanSettings:
        lapsed = now_s - self._last_promise_s >= self._lapse_s
        if lapsed != self._settings.cap_lapsed:
            self._settings = replace(self._settings, cap_lapsed=lapsed)
        return self._settings

    # Steps

    def scheduled(self, now_s: float, moved: Sequence[Progress], scheduled_keys: dict[str, int]) -> None:
        """A step was scheduled: `moved` are its prefills, the rest of `scheduled_keys` decoding requests."""
        table = self.table
        mask = np.fromiter((key in scheduled_keys for key in table.keys), np.bool_, len(table))
        context = int(table.ints("context")[mask].sum())
        context += sum(p.computed_tokens - p.scheduled_tokens for p in moved)
        tokens = sum(scheduled_keys.values())
        shape = BatchShape(tokens, context, len(scheduled_keys)) if tokens else None
        done_s = self.timer.started(now_s, shape)
        table.advance(mask)
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
            self.reorder = True
            if request.pending:
                verdict = self.pending.starting(request, request.prefill(self.tier_of(request)))
                self._settle(request, verdict, now_s)
        if progress.computed_tokens < progress.total_tokens:
            return False
        del self.prefilling[request.key]
        request.tokens += 1
        request.outputs += 1
        self.table.add(request, self.tier_of(request), done_s)
        self.reorder = True
        if request.multi_stage:
            self._staged[request.key] = request
        return True

    def completed(self, now_s: float) -> None:
        """The oldest step in flight is done; call before the engine looks at its output."""
        self.timer.completed(now_s)

    def observed(self, now_s: float) -> None:
        """The engine has taken the output of the oldest step in flight; requests that ended are gone already."""
        step = self._steps.pop(0)
        for request in step.first_tokens:
            if request.anchor_s is None and len(request.produced):
                if request.pending:
                    prefill = request.prefill(self.tier_of(request))
                    self._settle(request, self.pending.first_token(request, prefill, now_s), now_s)
                request.first_token(now_s)
                self.changed[request.key] = request
                if request.decoding:
                    self.table.refresh(request, self.tier_of(request))
        for request in [r for r in self._staged.values() if r.decoding and r.stage_ended()]:
            self.table.sync(request)
            request.enter_stage(now_s)
            self.table.restage(request, self.tier_of(request))
            self._moved(request)
            if not request.multi_stage:
                del self._staged[request.key]
        self.timer.set_busy(bool(len(self.table) or self.prefilling or self.waiting_count))
