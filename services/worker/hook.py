"""The scheduler hook's decisions, without vLLM: what each step may contain, and who has a promise.

Theory of operation. On top of the books (`hook_books.py`), `scheduler.py` asks before a step: `demote_lost` (promises
that no plan can keep any more), `reconsider` (verdicts on pending requests), `shortage` (best effort to preempt first)
and `steer`, which forms the batch with the core and says it as limits: tokens per request, and which waiting requests
to let in, in order.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from services.core.admission import Policy, decide
from services.core.batch import form_batch
from services.core.columns import columns_of
from services.core.duration_cap import caps_around
from services.core.lost import lost_promises
from services.core.perf_model import PerfModel
from services.core.verdict import EARLY_PROMPT_TOKENS
from services.core.view import PlanSettings, ReplicaView
from services.core.warm import warm_up
from services.worker import hook_room
from services.worker.hook_books import Books
from services.worker.hook_config import ATTAINMENT_FLOOR
from services.worker.hook_pending import Decided
from services.worker.hook_request import TrackedRequest
from services.worker.hook_room import admissible, blocks_to_finish, new_blocks
from services.worker.hook_steering import Pool, Shortage, Steering

__all__ = ["Hook"]

_BEST_EFFORT_WINDOW = 32
_AGED_AGAIN = 2.0  # times what it needs at least, an aged request that came too late is due again


class Hook(Books):
    """Decides for one engine."""

    def __init__(
        self,
        settings: PlanSettings,
        model: PerfModel | None,
        lapse_s: float,
        max_num_seqs: int,
        now_s: float,
        policy: Policy = Policy.MH,
        early_prompt_tokens: int = EARLY_PROMPT_TOKENS,
        attainment_floor: float = ATTAINMENT_FLOOR,
        max_verify: int = 1,
        pausing: bool = True,
    ) -> None:
        super().__init__(
            model,
            max_num_seqs,
            now_s,
            lapse_s=lapse_s,
            policy=policy,
            early_prompt_tokens=early_prompt_tokens,
            attainment_floor=attainment_floor,
            max_verify=max_verify,
            hold_first_token=settings.hold_first_token,
            pausing=pausing,
        )
        self._settings = settings
        self._policy = policy
        self._default_caps_s = settings.caps_s
        self._lapse_s = lapse_s

    def warm_up(self) -> None:
        """Have the core's kernels compiled (or loaded) before the first step needs them."""
        warm_up(self._policy)

    def set_cap(self, seconds: float | None) -> None:
        """Cap the duration of batches, with longer ones tried on conflict; None restores the configured caps."""
        caps = self._default_caps_s if seconds is None else caps_around(seconds)
        self._settings = replace(self._settings, caps_s=caps)

    def expect_promises(self, now_s: float) -> None:
        """Plan steps, and keep batches short, as if a promise had just been made."""
        self._last_promise_s = max(self._last_promise_s, now_s)

    def planning(self, now_s: float) -> bool:
        """Whether steps are planned: there is a model, no profile is running, and promises are or were around."""
        if self.timer.model is None or self._probes:
            return False
        return self._promised > 0 or len(self.pending) > 0 or now_s - self._last_promise_s < self._lapse_s

    def demote_lost(self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> None:
        """Demote the promises that no plan can keep any more, before they cost one that can be kept."""
        if not self._promised:
            return
        promised = [request for request in waiting if request.promised]
        view = self._view(now_s, promised, pool, [r for r in self.prefilling.values() if r.promised])
        lost = lost_promises(view, self.speculation.tokens_per_step)
        if lost:  # of their own deadlines, that is, and not only of what is kept in hand
            in_hand_s = max((request.in_hand_s for request in self.table.requests), default=0.0)
            lost = lost_promises(view, self.speculation.tokens_per_step, in_hand_s)
        if not lost:
            return
        requests = (*promised, *self.prefilling.values(), *self.table.requests)
        for request in [request for request in requests if request.promised and request.key in lost]:
            if request.aged:  # it keeps its turn: soon due again, it is next for the memory that it lacked
                self._put_off(request, now_s + _AGED_AGAIN * lost[request.key].needed)
                continue
            self._promised -= 1
            self.outcomes.lost(request)
            self.hold.discard(request)
            self.demoted.append(Decided(request, False, math.nan, math.nan, lost[request.key]))
            self._demote(request)

    def _put_off(self, request: TrackedRequest, due_s: float) -> None:
        if request.decoding:
            self.table.sync(request)
        request.relax(due_s, request.tpot_s)
        self._moved(request)

    def age(
        self,
        request: TrackedRequest,
        now_s: float,
        due_s: float,
        tpot_s: float,
        waiting: Sequence[TrackedRequest],
        pool: Pool,
        *,
        insist: bool = False,
    ) -> bool:
        """Plan a best-effort request like a promise from now on, due at `due_s`; False where no plan holds it.

        `insist`: whether one does or not.
        """
        tier = request.tier_names[request.tracker.stage_index]
        if request.decoding:  # it has its blocks, and costs one token of a batch
            self.table.sync(request)
            due_s = now_s + tpot_s
        elif not insist:
            spare = replace(pool, free_blocks=min(pool.total_blocks, pool.free_blocks + self._best_effort_blocks(pool)))
            view = self._view(
                now_s, [r for r in waiting if r.promised], spare, [r for r in self.prefilling.values() if r.promised]
            )
            asked = replace(request.prefill(self._tiers.index(tier)), deadline_s=due_s, promised=False)
            if not decide(view, (asked,), self._policy, self._settings_now(view)).by_id[request.key].admitted:
                return False
        request.relax(due_s, tpot_s)
        self.promote(request, tier, now_s)
        return True

    def _best_effort_blocks(self, pool: Pool) -> int:
        """KV blocks of requests that may be preempted for promised work."""
        contexts = [*self.table.ints("context")[self.table.ints("tier") < 0].tolist()]
        contexts += [r.computed_tokens for r in self.prefilling.values() if not r.on_tier]
        return sum(-(-context // pool.block_size) for context in contexts)

    def take_up(self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> None:
        """Let paused requests go on that must, or that memory has come free for."""
        model = self.timer.model
        if not self.pauses or model is None:
            return
        others = (request for request in waiting if request.on_tier and request.key not in self.pauses)
        needed = sum(blocks_to_finish(request, pool) for request in (*self.prefilling.values(), *others))
        free = pool.free_blocks - needed
        self.pauses.take_up(now_s, model, self._settings.caps_s[0], len(self.table), free, pool.block_size)

    def pausable(self, now_s: float) -> list[TrackedRequest]:
        """Promised decoders that can do without their blocks for a while, the longest first."""
        model = self.timer.model
        return [] if model is None else self.pauses.pausable(self.table, now_s, model, self._settings.caps_s[0])

    def considered(self, waiting: Sequence[TrackedRequest]) -> list[TrackedRequest]:
        """The waiting requests worth planning with: all promised or pending ones and the first of best effort.

        Paused ones are not among them.
        """
        if self.pauses:
            waiting = [request for request in waiting if request.key not in self.pauses]
        on_tier = [request for request in waiting if request.on_tier]
        if len(on_tier) == len(waiting):
            return on_tier
        best_effort = (request for request in waiting if not request.on_tier)
        return [*on_tier, *islice(best_effort, _BEST_EFFORT_WINDOW)]

    def reconsider(self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> list[TrackedRequest]:
        """Ask about the pending requests; those of `waiting` that the next batch may start."""
        if not self.pending:
            return list(waiting)
        on_tier = [request for request in waiting if request.on_tier]
        view = self._view(now_s, on_tier, pool, [*self.prefilling.values()])
        view = self.pauses.widened(view, self._settings.caps_s[0], self.tier_of)
        for request, verdict in self.pending.ask(view, self._settings_now(view)):
            self._settle(request, verdict, now_s)
        if self.pending.set_aside:
            self.pace.conflict(now_s)
        return [request for request in waiting if request.key not in self.pending.set_aside]

    def steer(self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> Steering:
        """Form the next batch and say it as limits.

        No best effort starts while a promised request is paused: it would soon be preempted.
        """
        if self.pauses:
            waiting = [request for request in waiting if request.on_tier]
        view = self._view(
            now_s, admissible(self.table, self.prefilling.values(), waiting, pool, self.speculation.max_verify), pool
        )
        settings = self._settings_now(view)
        if self._promised > 0 and not self.pace.joins(now_s):
            settings = replace(settings, best_effort_cap_s=0.0)
        plan = form_batch(view, settings)
        verify = plan.verify_tokens if self.speculation.enabled else None
        if plan.token_budget == 0:
            return Steering(plan=plan)  # nothing the plan could place: let the engine try by itself rather than idle
        chunks = {chunk.id: chunk.tokens for chunk in (*plan.prefill, *plan.best_effort_prefill)}
        limits = dict.fromkeys(plan.skipped_ids, 0)
        for key in self.prefilling:
            limits[key] = chunks.get(key, 0)
        columns = self.table.columns()
        if len(columns) - columns.on_tier.number > len(plan.best_effort_decode_ids):
            chosen = set(plan.best_effort_decode_ids)
            best_effort = (key for key, tier in zip(columns.ids, columns.tier.tolist(), strict=True) if tier < 0)
            limits.update((key, 0) for key in best_effort if key not in chosen)
        admit = tuple(key for key in chunks if key not in self.prefilling)
        limits.update((key, chunks[key]) for key in admit)
        return Steering(limits, admit, plan.token_budget, plan, verify)

    def crowded(self, waiting: Sequence[TrackedRequest], pool: Pool) -> bool:
        """Whether all promised work together could lack blocks or seats: a bound that is cheap to ask every step."""
        return hook_room.crowded(self.table, self.prefilling.values(), waiting, pool)

    def shortage(
        self, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool, held_blocks: int
    ) -> Shortage | None:
        """What the next batch's promised work lacks while best effort holds `held_blocks`; None if nothing."""
        view = self._view(now_s, waiting, pool)
        settings = self._settings_now(view)
        view = replace(
            view,
            decoders=[decoder for decoder in view.decoders if decoder.tier >= 0],
            prefills=[prefill for prefill in view.prefills if prefill.tier >= 0],
            free_blocks=min(pool.total_blocks, pool.free_blocks + held_blocks),
        )
        plan = form_batch(view, settings)
        planned = {chunk.id for chunk in plan.prefill}
        starting = [request for request in waiting if request.key in planned]
        blocks = new_blocks(self.table, pool, max(settings.verify_tokens, default=1), promised_only=True)
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
        prefills = [self._prefill(request) for request in (*started, *waiting)]
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

    def _settings_now(self, view: ReplicaView) -> PlanSettings:
        lapsed = view.now_s - self._last_promise_s >= self._lapse_s
        if lapsed != self._settings.cap_lapsed:
            self._settings = replace(self._settings, cap_lapsed=lapsed)
        if not self.speculation.enabled:
            return self._settings
        return self.speculation.settings(
            self._settings, view.model, columns_of(view.decoders), self.table.ints("application"), view.prefills
        )
