"""Our front: which replica a call goes to, with a promise, undecided, or as best effort, as the services do it.

Theory of operation. On arrival the core is asked about the call on top of everything its replica has, as the planner
does, under the cap on batches that those who asked so far lead to, and `services.core.verdict` says what the answer
amounts to. The first promise wins; otherwise the call waits,
pending, in the engine whose plan holds it for now, or else where its first token is expected soonest, and the hook
decides it before some batch. What is declined on arrival waits here, in the order of `services.core.best_effort`, until
the worker's pull rule takes it. With firm verdicts, best effort in the engine is asked about again every 50 ms.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from bench.metrics import met
from bench.simulator_call import LiveCall
from bench.simulator_hook import SimulatedHook
from bench.simulator_placement import SimulatedRouter
from bench.simulator_replica import Replica
from services.core.admission import Decision, Decisions, Policy, decide
from services.core.best_effort import BestEffortEntry, may_pull, order_entries
from services.core.duration_cap import DurationCap
from services.core.floors import AttainmentFloors
from services.core.placement import OrderName
from services.core.slo import Tier, VerdictMode, tier_for
from services.core.verdict import EARLY_PROMPT_TOKENS, VerdictKind, displaces, verdict_for
from services.core.view import PlanSettings, Prefill, ReplicaView
from services.worker.link import Promote, SetCap

__all__ = ["FrontSettings", "PlannedFront"]

_PROMOTE_EVERY_S = 0.05
_MOST_ASKED = 32
_PULL_BATCH_S = 0.100


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """How calls are admitted. `best_effort`: what is declined on arrival runs in what is left over, or never."""

    policy: Policy
    plan: PlanSettings
    tiers: tuple[Tier, ...]
    verdict: VerdictMode = VerdictMode.EARLY
    floor: float = 0.85
    best_effort: bool = True
    order: OrderName = OrderName.FULLEST_FIRST


@dataclass(frozen=True, slots=True)
class _Offer:
    replica: Replica
    decision: Decision


@dataclass(slots=True)
class _Capped:
    """How a replica's batches are planned now, and what their cap follows."""

    plan: PlanSettings
    cap: DurationCap = field(default_factory=DurationCap)


class PlannedFront:
    """Admission for hooked replicas. `forecast` gives the expected output of a call, `learn` sees finished ones."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        settings: FrontSettings,
        forecast: Callable[[LiveCall], int],
        learn: Callable[[LiveCall], None],
    ) -> None:
        self.replicas = replicas
        self._settings = settings
        self._forecast = forecast
        self._learn = learn
        self._floors = AttainmentFloors(floor=settings.floor)
        self._waiting: dict[str, LiveCall] = {}
        self._router = SimulatedRouter(replicas, settings.order)
        self._promoted_s = -math.inf
        self._capped = {id(replica): _Capped(settings.plan) for replica in replicas}
        for replica in replicas:
            for tier in settings.tiers:
                _hook(replica).tier_index(tier.name)

    def arrived(self, call: LiveCall, now_s: float) -> None:
        """The first replica that promises it takes it; else it is pending where it may fit, or best effort."""
        pending: list[_Offer] = []
        for replica in self._router.order(call, self._forecast(call)):
            prefill = self._prefill(call, replica)
            self._cap(replica, prefill, now_s)
            decisions = self._decide(replica, _hook(replica).view(now_s), [prefill]).by_id
            decision = decisions[call.key]
            early = 0 if displaces(decisions.values(), {call.key}) else EARLY_PROMPT_TOKENS
            match verdict_for(self._settings.verdict, prefill, decision, early_prompt_tokens=early):
                case VerdictKind.ADMITTED:
                    self._add(replica, call, promised=True, now_s=now_s)
                    return
                case VerdictKind.PENDING:
                    pending.append(_Offer(replica, decision))
        if pending:
            best = min(pending, key=lambda o: (not o.decision.admitted, o.decision.predicted_first_token_s))
            self._add(best.replica, call, pending=True, now_s=now_s)
        else:
            self._waiting[call.key] = call

    def before_batch(self, replica: Replica, now_s: float) -> None:
        """Ask again about what waits, then pull best effort where there is room."""
        hook = _hook(replica)
        if self._settings.verdict is VerdictMode.FIRM and now_s - self._promoted_s >= _PROMOTE_EVERY_S:
            self._promote(replica, hook, now_s)
        if self._waiting and self._settings.best_effort:
            self._pull(replica, hook, now_s)

    def after_batch(self, replica: Replica, now_s: float) -> None:
        """Take note of what the hook has decided."""
        for key, admitted in _hook(replica).take_decided():
            if admitted and key in replica.calls:
                replica.calls[key].promised_s = now_s
            elif not admitted and not self._settings.best_effort:
                replica.drop(key)

    def may_have_work(self, replica: Replica) -> bool:
        """Whether `before_batch` may give the replica something to do."""
        return bool(self._waiting) and self._settings.best_effort

    def finished(self, call: LiveCall, now_s: float) -> None:
        """Learn from it."""
        self._learn(call)
        self._floors.observe(call.job.application, met(call))

    # Asking

    def _prefill(self, call: LiveCall, replica: Replica) -> Prefill:
        """The call as a candidate: planned at its tightest stage, because a promise covers all of them."""
        tpot_s = min(stage.tpot_s for stage in call.call.stages)
        tiers = self._settings.tiers
        return Prefill(
            id=call.key,
            tier=_hook(replica).tier_index(tiers[tier_for(tpot_s, tiers)].name),
            deadline_s=call.deadline_s,
            tpot_s=tpot_s,
            prompt_tokens=call.call.prompt_tokens,
            computed_tokens=replica.cached_tokens(call),
            output_tokens=self._forecast(call),
            application=call.job.application,
            weight=self._floors.weight(call.job.application),
            arrival_s=call.arrival_s,
        )

    def _decide(self, replica: Replica, view: ReplicaView, prefills: Sequence[Prefill]) -> Decisions:
        return decide(view, prefills, self._settings.policy, self._capped[id(replica)].plan)

    def _cap(self, replica: Replica, prefill: Prefill, now_s: float) -> None:
        """The cap on the replica's batches follows how long those that ask it can wait."""
        capped, model = self._capped[id(replica)], replica.shape.preset.model
        alone_s = model.zero_load_prefill_s(prefill.remaining_tokens)
        capped.cap.asked(now_s, prefill.deadline_s - prefill.arrival_s - alone_s)
        caps_s = capped.cap.caps_s(now_s, model, replica.shape.depth)
        if caps_s != capped.plan.caps_s:
            capped.plan = replace(capped.plan, caps_s=caps_s)
            _hook(replica).post(SetCap(caps_s[0]))

    def _promotable(self, hook: SimulatedHook, now_s: float) -> Iterator[Prefill]:
        """Best effort in the engine that could still be promised, most urgent first."""
        for prefill, tier in sorted(hook.unpromised(), key=lambda found: found[0].deadline_s)[:_MOST_ASKED]:
            if prefill.deadline_s > now_s:
                yield replace(prefill, tier=tier, weight=self._floors.weight(prefill.application))

    def _promote(self, replica: Replica, hook: SimulatedHook, now_s: float) -> None:
        candidates = list(self._promotable(hook, now_s))
        if not candidates:
            return
        self._promoted_s = now_s
        view = hook.view(now_s, {candidate.id for candidate in candidates})
        decisions = self._decide(replica, view, candidates).by_id
        for candidate in candidates:
            if decisions[candidate.id].admitted:
                call = replica.calls[candidate.id]
                call.promised_s = now_s
                tightest_s = min(stage.tpot_s for stage in call.call.stages)
                hook.post(Promote(candidate.id, replica.tier_name(tightest_s)))

    # Best effort

    def _pull(self, replica: Replica, hook: SimulatedHook, now_s: float) -> None:
        """The worker's rule for taking best effort from the shared queue."""
        model = replica.shape.preset.model
        entries = [
            BestEffortEntry(call.key, call.arrival_s, call.call.prompt_tokens, call.deadline_s)
            for call in self._waiting.values()
        ]
        waiting_tokens = sum(prefill.remaining_tokens for prefill, _ in hook.unpromised())
        free_blocks = hook.free_blocks_after_waiting()
        batch_tokens = max(1, model.tokens_within(_PULL_BATCH_S, requests=1))
        for entry in order_entries(entries, now_s, prefill_s_per_token=model.rows[0][0]):
            idle = not replica.has_work
            if not idle and not may_pull(
                unprefilled_tokens=waiting_tokens,
                batch_tokens=batch_tokens,
                prompt_tokens=entry.prompt_tokens,
                forecast_free_blocks=free_blocks,
                block_size=replica.shape.preset.block_size,
            ):
                return
            self._add(replica, self._waiting.pop(entry.id), now_s=now_s)
            waiting_tokens += entry.prompt_tokens
            free_blocks -= -(-entry.prompt_tokens // replica.shape.preset.block_size)

    def _add(
        self, replica: Replica, call: LiveCall, *, now_s: float, promised: bool = False, pending: bool = False
    ) -> None:
        mode = self._settings.verdict if pending else None
        self._router.placed(call, replica)
        replica.add(call, forecast_tokens=self._forecast(call), promised=promised, pending=mode, now_s=now_s)


def _hook(replica: Replica) -> SimulatedHook:
    hook = replica.scheduler
    assert isinstance(hook, SimulatedHook)
    return hook
