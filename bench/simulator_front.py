"""Our front: who is promised, and what waits as best effort, decided by the core as the services decide it.

Theory of operation. On arrival the core is asked about the call on top of everything its replica has, and
`services.core.verdict` says what the answer amounts to. A call that is promised goes to the replica at once; the others
wait here, in the order of `services.core.best_effort`, until the worker's pull rule takes them as best effort. What
waits is asked about again:

- `AT_BATCHES`: before every batch, all of it together, inside the engine or not, and promised once its prefill would
  start (or earlier where it is cheap): the policy as designed;
- `AT_INTERVALS`: every 50 ms, only what the engine has as best effort: the planner service without late verdicts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from bench.metrics import met
from bench.simulator_call import LiveCall
from bench.simulator_hook import SimulatedHook
from bench.simulator_replica import Replica
from services.core.admission import Decisions, Policy, decide
from services.core.batch import form_batch
from services.core.best_effort import BestEffortEntry, may_pull, order_entries
from services.core.floors import AttainmentFloors
from services.core.slo import Tier, VerdictMode, tier_for
from services.core.verdict import VerdictKind, verdict_for
from services.core.view import PlanSettings, Prefill, ReplicaView
from services.worker.link import Promote

__all__ = ["Asked", "FrontSettings", "PlannedFront"]

_PROMOTE_EVERY_S = 0.05
_MOST_ASKED = 32
_PULL_BATCH_S = 0.100


class Asked(Enum):
    """When waiting requests are decided again."""

    AT_BATCHES = auto()
    AT_INTERVALS = auto()


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """How calls are admitted. `floor`: attainment under which an application counts ten times; 0 for none."""

    policy: Policy
    plan: PlanSettings
    tiers: tuple[Tier, ...]
    asked: Asked = Asked.AT_BATCHES
    verdict: VerdictMode = VerdictMode.EARLY
    floor: float = 0.85
    best_effort: bool = True


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
        self._promoted_s = -math.inf
        for replica in replicas:
            for tier in settings.tiers:
                _hook(replica).tier_index(tier.name)

    def arrived(self, call: LiveCall, now_s: float) -> None:
        """Promise it if the first replica that can takes it; else it waits."""
        for replica in sorted(self.replicas, key=lambda r: len(r.calls)):
            prefill = self._prefill(call, replica)
            decision = self._decide(_hook(replica).view(now_s), [prefill]).by_id[call.key]
            mode = VerdictMode.FIRM if self._settings.asked is Asked.AT_INTERVALS else self._settings.verdict
            if verdict_for(mode, prefill, decision) is VerdictKind.ADMITTED:
                self._add(replica, call, promised=True, now_s=now_s)
                return
        self._waiting[call.key] = call

    def before_batch(self, replica: Replica, now_s: float) -> None:
        """Ask again about what waits, then pull best effort where there is room."""
        hook = _hook(replica)
        if self._settings.asked is Asked.AT_BATCHES:
            self._promise_starting(replica, hook, now_s)
        elif now_s - self._promoted_s >= _PROMOTE_EVERY_S:
            self._promote_in_engine(replica, hook, now_s)
        if self._waiting and self._settings.best_effort:
            self._pull(replica, hook, now_s)

    def may_have_work(self, replica: Replica) -> bool:
        """Whether something waits here."""
        return bool(self._waiting)

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

    def _decide(self, view: ReplicaView, prefills: Sequence[Prefill]) -> Decisions:
        return decide(view, prefills, self._settings.policy, self._settings.plan)

    def _candidates(self, replica: Replica, now_s: float) -> Iterator[Prefill]:
        """Everything that could still be promised, most urgent first: in the engine as best effort, or waiting here."""
        found = [self._prefill(call, replica) for call in self._waiting.values() if call.deadline_s > now_s]
        for prefill, tier in _hook(replica).unpromised():
            if prefill.deadline_s > now_s:
                weight = self._floors.weight(prefill.application)
                found.append(replace(prefill, tier=tier, weight=weight))
        yield from sorted(found, key=lambda prefill: prefill.deadline_s)

    def _promise_starting(self, replica: Replica, hook: SimulatedHook, now_s: float) -> None:
        """Late verdicts: decide all that waits, and promise what would start in the batch about to be formed."""
        candidates = list(self._candidates(replica, now_s))
        if not candidates:
            return
        view = hook.view(now_s, {candidate.id for candidate in candidates})
        decisions = self._decide(view, candidates)
        by_id = decisions.by_id
        kept = [candidate for candidate in candidates if by_id[candidate.id].admitted]
        if not kept:
            return
        plan = form_batch(view.with_prefills([*view.prefills, *kept]), self._settings.plan)
        starting = {chunk.id for chunk in plan.prefill}
        for candidate in kept:
            decision = by_id[candidate.id]
            verdict = verdict_for(self._settings.verdict, candidate, decision, starting=candidate.id in starting)
            if verdict is VerdictKind.ADMITTED:
                self._promise(replica, hook, candidate, now_s)

    def _promote_in_engine(self, replica: Replica, hook: SimulatedHook, now_s: float) -> None:
        candidates = [c for c in self._candidates(replica, now_s) if c.id not in self._waiting][:_MOST_ASKED]
        if not candidates:
            return
        self._promoted_s = now_s
        decisions = self._decide(hook.view(now_s, {candidate.id for candidate in candidates}), candidates).by_id
        for candidate in candidates:
            if decisions[candidate.id].admitted:
                self._promise(replica, hook, candidate, now_s)

    def _promise(self, replica: Replica, hook: SimulatedHook, candidate: Prefill, now_s: float) -> None:
        call = self._waiting.pop(candidate.id, None)
        if call is not None:
            self._add(replica, call, promised=True, now_s=now_s)
            return
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
            self._add(replica, self._waiting.pop(entry.id), promised=False, now_s=now_s)
            waiting_tokens += entry.prompt_tokens
            free_blocks -= -(-entry.prompt_tokens // replica.shape.preset.block_size)

    def _add(self, replica: Replica, call: LiveCall, *, promised: bool, now_s: float) -> None:
        replica.add(call, forecast_tokens=self._forecast(call), promised=promised, now_s=now_s)


def _hook(replica: Replica) -> SimulatedHook:
    hook = replica.scheduler
    assert isinstance(hook, SimulatedHook)
    return hook
