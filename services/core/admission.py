"""Admission: which of the not yet promised requests can be served on time together with the promised ones?

Feasibility is a simulated plan (`services.core.simulate`) plus the forecast in steps (`services.core.memory`). Promised
requests are mandatory: no candidate is accepted whose plan would break one of them. The three policies differ in whom
they keep when not everything fits; what they keep has passed the same test.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from services.core import solver
from services.core.columns import DecoderColumns, columns_of
from services.core.compiled import seconds
from services.core.constraint import Constraint
from services.core.dp_solver import solve_exactly
from services.core.drafts import late_decoders, with_draft_lengths, without_drafts
from services.core.explain import constraint_of, found_causes
from services.core.problem import Problem, problem_of, with_lengths, with_spend
from services.core.simulate import IN_TIME
from services.core.view import SERVING_ORDER, PlanSettings, Prefill, ReplicaView

__all__ = ["Decision", "Decisions", "Plan", "Policy", "decide", "plan_for"]


class Policy(StrEnum):
    """How to choose among candidates that do not all fit."""

    GREEDY = "greedy"
    MH = "mh"
    DP = "dp"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one request that was not promised yet.

    `admitted`: the plan holds it together with everything promised. `predicted_first_token_s` is absolute; the TTFT is
    from its arrival (NaN without one). For a request that does not fit, the prediction is what it would get if all
    that was left out were served, in deadline order, after everything kept; infinite if the plan breaks off before.
    `predicted_tpot_s` is what the plan gives its tier while prefills wait, an upper estimate.
    """

    id: str
    admitted: bool
    predicted_first_token_s: float
    predicted_ttft_s: float
    predicted_tpot_s: float
    constraint: Constraint


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions for all requests that were not promised, and the plan that holds the kept ones.

    `cap_s` and `early_spend` are the duration cap and the early spending that plan needs; `form_batch` finds them by
    itself. `base_feasible` is False where the promised requests alone already miss something: nothing is admitted then
    that would delay them further. `kept_weight` is the total weight of what was kept. `verify_tokens` are the
    draft lengths per tier that the plan counts on: the settings', or chosen where only acceptance rates are given.
    """

    decisions: tuple[Decision, ...]
    cap_s: float
    base_feasible: bool = True
    early_spend: float = 0.0
    kept_weight: int = 0
    verify_tokens: tuple[int, ...] = ()

    @property
    def by_id(self) -> Mapping[str, Decision]:
        """Decisions by request id."""
        return MappingProxyType({decision.id: decision for decision in self.decisions})

    @property
    def admitted_ids(self) -> tuple[str, ...]:
        """Ids of what was kept, in the order the decisions are listed."""
        return tuple(decision.id for decision in self.decisions if decision.admitted)


@dataclass(frozen=True, slots=True)
class Plan:
    """A solved admission problem: the arrays, the solution, and the prefills on tiers in deadline order."""

    view: ReplicaView
    items: Sequence[Prefill]
    asked: Sequence[int]
    problem: Problem
    solution: solver.Solution
    verify_tokens: tuple[int, ...] = ()

    @property
    def rank(self) -> tuple[bool, int]:
        """What makes one plan better than another: no promise missed, then the weight kept."""
        return bool(self.solution.base_feasible), int(self.solution.weight)

    def row(self, request_id: str) -> int:
        """Row of a request; ValueError if it is not part of the plan."""
        return [item.id for item in self.items].index(request_id)


def decide(
    view: ReplicaView, candidates: Sequence[Prefill], policy: Policy = Policy.MH, settings: PlanSettings | None = None
) -> Decisions:
    """Decide on `candidates` and on the unpromised prefills of the view, together.

    Decisions come in the order: unpromised prefills of the view, then candidates; for GREEDY that is the order of
    arrival. Prefills of tier -1 are ignored. What is not kept is left out for now: ask again at the next batch.
    """
    plan = plan_for(view, candidates, policy, settings or PlanSettings())
    answers = _Answers(plan)
    return Decisions(
        tuple(answers.decision(row) for row in plan.asked),
        plan.solution.cap_s,
        plan.solution.base_feasible,
        plan.problem.limits.early_spend,
        plan.solution.weight,
        plan.verify_tokens,
    )


def plan_for(view: ReplicaView, candidates: Sequence[Prefill], policy: Policy, settings: PlanSettings) -> Plan:
    """Solve; where draft lengths are to be chosen, for everything asked and again for what that kept, and without."""
    question = _question(view, candidates, policy, settings)
    columns, items = question.columns, question.items
    drafting = with_draft_lengths(settings, view.model, columns, items)
    problem = problem_of(view, columns, items, drafting, 0.0)
    plan = question.solved(problem, drafting)
    if drafting is settings:
        return plan
    kept = [item for item, standing in zip(items, plan.solution.standing.tolist(), strict=True) if standing]
    if len(kept) == len(items) and plan.solution.base_feasible and not late_decoders(plan.problem):
        return plan
    tried = {drafting.verify_tokens}
    for other in (with_draft_lengths(settings, view.model, columns, kept), without_drafts(drafting)):
        if other.verify_tokens not in tried:
            tried.add(other.verify_tokens)
            again = question.solved(with_lengths(problem, columns, other), other)
            plan = again if _rank_with_drafts(again) > _rank_with_drafts(plan) else plan
    return plan


def _rank_with_drafts(plan: Plan) -> tuple[bool, int, int]:
    """As `Plan.rank`, between plans with different drafts: these may make decoders late, or save them from it."""
    base_feasible, weight = plan.rank
    return base_feasible, -late_decoders(plan.problem), weight


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, whatever the draft lengths. `asked` are the rows of `items` to decide on, in order of arrival."""

    view: ReplicaView
    columns: DecoderColumns
    items: Sequence[Prefill]
    asked: Sequence[int]
    weight: int
    policy: Policy
    settings: PlanSettings

    def solved(self, problem: Problem, settings: PlanSettings) -> Plan:
        """Solve without early spending, and again with it where that is allowed and not everything fits."""
        plan = self._solved_once(problem, settings.verify_tokens)
        if settings.early_spend > 0 and plan.rank < (True, self.weight):
            spending = with_spend(problem, self.columns, settings.early_spend)
            again = self._solved_once(spending, settings.verify_tokens)
            plan = again if again.rank > plan.rank else plan
        return plan

    def _solved_once(self, problem: Problem, verify_tokens: tuple[int, ...]) -> Plan:
        settings = self.settings
        caps_s, arrived = np.array(settings.caps_s), np.array(self.asked, np.int64)
        if self.policy is Policy.DP:
            acceptance = np.array(settings.acceptance, np.float64)
            margin_s = settings.hopeless_margin_s
            solution = solve_exactly(problem, caps_s, arrived, margin_s, acceptance, settings.max_verify_tokens)
        else:
            code = solver.MH if self.policy is Policy.MH else solver.GREEDY
            solution = solver.solve(problem, code, caps_s, arrived, settings.hopeless_margin_s)
        return Plan(self.view, self.items, self.asked, problem, solution, verify_tokens)


def _question(view: ReplicaView, candidates: Sequence[Prefill], policy: Policy, settings: PlanSettings) -> _Question:
    asked = [p for p in (*view.prefills, *candidates) if p.tier >= 0 and not p.promised]
    held = [p for p in view.prefills if p.tier >= 0 and p.promised]
    items = sorted([*held, *asked], key=SERVING_ORDER)
    rows = {item.id: row for row, item in enumerate(items)}
    weight = sum(item.weight for item in asked)
    return _Question(view, columns_of(view.decoders), items, [rows[p.id] for p in asked], weight, policy, settings)


class _Answers:
    """Turns a solution into decisions."""

    def __init__(self, plan: Plan) -> None:
        self.start_s, self.items = plan.view.start_s, plan.items
        problem, solution = plan.problem, plan.solution
        self.causes = found_causes(solution.causes)
        self.standing = solution.standing.tolist()
        self.finish_s = solution.finish_s.tolist()
        kept = int(np.count_nonzero(solution.standing))
        requests = len(problem.base.steps) + kept
        context = float(problem.base.context[0])
        verify = int(problem.tiers.verify.max(initial=1))
        decode_s = seconds(problem.coef, requests * verify, context, requests, verify - 1)
        batch_s = max(decode_s, solution.batch_s)
        self.tpots_s = (batch_s / problem.tiers.gain).tolist()

    def decision(self, row: int) -> Decision:
        """The decision on item `row`."""
        item, finish_s = self.items[row], self.finish_s[row]
        admitted = self.standing[row] == IN_TIME
        tpot_s = self.tpots_s[item.tier]
        if admitted:
            tpot_s = min(tpot_s, item.tpot_s)
        ttft_s = finish_s - item.arrival_s if math.isfinite(finish_s) else finish_s
        constraint = constraint_of(self.start_s, self.items, self.causes[row], row)
        return Decision(item.id, admitted, finish_s, ttft_s, tpot_s, constraint)
