"""Quote: would this request fit now, and if not, which SLO would, or when?

Whatever the policy keeps of the requests already waiting counts as taken; the tightest SLO is found by bisection over
the same decision that admission makes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.core.admission import Decision, Policy, decide, plan_for
from services.core.retry import earliest_fit_s
from services.core.slo import Tier
from services.core.view import PlanSettings, Prefill, ReplicaView

__all__ = ["Quote", "quote", "retry_delay_s", "retry_delays_s"]

_PRECISION_S = 0.001
_LONGEST_TTFT_S = 120.0


@dataclass(frozen=True, slots=True)
class Quote:
    """The answer to "would it fit?".

    `tightest_ttft_s`: the shortest first-token time, from now, at which it would fit with the TPOT asked for (inf:
    none up to two minutes). `tightest_tpot_s`: the tightest tier at which it would fit with the TTFT asked for (inf:
    none). `earliest_s`: from when on, in seconds from now, the SLO as asked would fit (0: now, inf: never).
    """

    fits: bool
    decision: Decision
    tightest_ttft_s: float
    tightest_tpot_s: float
    earliest_s: float


def quote(
    view: ReplicaView, candidate: Prefill, tiers: Sequence[Tier], policy: Policy, settings: PlanSettings
) -> Quote:
    """Quote for `candidate`; `tiers` are the configured TPOT tiers, `candidate.tier` an index into them."""
    decision = decide(view, (candidate,), policy, settings).by_id[candidate.id]
    taken = _with_the_kept(view, policy, settings)

    def fits(trial: Prefill) -> bool:
        return decide(taken, (trial,), Policy.GREEDY, settings).by_id[trial.id].admitted

    at_tiers = [_at_tier(candidate, index, tier) for index, tier in enumerate(tiers)]
    return Quote(
        decision.admitted,
        decision,
        _tightest_ttft_s(view, candidate, fits),
        min((trial.tpot_s for trial in at_tiers if fits(trial)), default=math.inf),
        0.0 if decision.admitted else retry_delay_s(view, candidate, policy, settings),
    )


def retry_delay_s(view: ReplicaView, candidate: Prefill, policy: Policy, settings: PlanSettings) -> float:
    """Seconds from now until `candidate`, asked for again with the same SLO, would fit; inf if it never will."""
    return retry_delays_s(view, (candidate,), policy, settings)[candidate.id]


def retry_delays_s(
    view: ReplicaView, candidates: Sequence[Prefill], policy: Policy, settings: PlanSettings
) -> dict[str, float]:
    """The retry delay of each candidate by id, out of one plan with all of them; 0 for those that fit together now."""
    plan = plan_for(view, candidates, policy, settings)
    delays: dict[str, float] = {}
    for candidate in candidates:
        wait_s = earliest_fit_s(plan.problem, plan.solution, plan.items, plan.row(candidate.id))
        delays[candidate.id] = wait_s + view.start_s - view.now_s if wait_s > 0 else 0.0
    return delays


def _with_the_kept(view: ReplicaView, policy: Policy, settings: PlanSettings) -> ReplicaView:
    """The view with what a decision keeps of its waiting prefills promised, and the rest gone."""
    kept = set(decide(view, (), policy, settings).admitted_ids)
    return view.with_prefills(
        [
            p if p.promised or p.tier < 0 else replace(p, promised=True)
            for p in view.prefills
            if p.promised or p.tier < 0 or p.id in kept
        ]
    )


def _at_tier(candidate: Prefill, index: int, tier: Tier) -> Prefill:
    return replace(candidate, tier=index, tpot_s=tier.tpot_s)


def _tightest_ttft_s(view: ReplicaView, candidate: Prefill, fits: Callable[[Prefill], bool]) -> float:
    """Bisection: a later deadline is never harder to meet, up to the rounding of batches."""
    low, high = 0.0, max(_PRECISION_S, candidate.deadline_s - view.now_s)
    while not fits(replace(candidate, deadline_s=view.now_s + high)):
        low, high = high, 2 * high
        if high > _LONGEST_TTFT_S:
            return math.inf
    while high - low > _PRECISION_S:
        middle = (low + high) / 2
        if fits(replace(candidate, deadline_s=view.now_s + middle)):
            high = middle
        else:
            low = middle
    return high
