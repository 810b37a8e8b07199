"""Admission: which of the not yet promised requests can be served on time together with the promised ones?

Feasibility is a simulated plan (`services.core.simulate`) plus the forecast in steps (`services.core.memory`). Promised
requests are mandatory: a plan that breaks one of them is never accepted because of a candidate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from services.core import simulate as sim
from services.core.batch import rules_of
from services.core.columns import Ints, columns_of, queue_of, tiers_of
from services.core.compiled import seconds
from services.core.constraint import FITS, Constraint, ConstraintKind
from services.core.memory import Forecast, forecast_steps
from services.core.view import PlanSettings, Prefill, ReplicaView

__all__ = ["Decision", "Decisions", "Policy", "decide"]


class Policy(StrEnum):
    """How to choose among candidates that do not all fit."""

    GREEDY = "greedy"
    MH = "mh"
    DP = "dp"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer for one request that was not promised yet.

    `admitted`: the plan holds it together with everything promised. `predicted_first_token_s` is absolute; the TTFT is
    from its arrival (NaN without one). For a request that does not fit, the prediction is what it would get after
    everything that was kept.
    """

    id: str
    admitted: bool
    predicted_first_token_s: float
    predicted_ttft_s: float
    predicted_tpot_s: float
    constraint: Constraint


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions for all requests that were not promised, and the duration cap of the plan that holds the kept ones.

    `base_feasible` is False where the promised requests alone already miss something: nothing is admitted then that
    would slow them further.
    """

    decisions: tuple[Decision, ...]
    cap_s: float
    base_feasible: bool = True

    @property
    def by_id(self) -> Mapping[str, Decision]:
        """Decisions by request id."""
        return MappingProxyType({decision.id: decision for decision in self.decisions})

    @property
    def admitted_ids(self) -> tuple[str, ...]:
        """Ids of what was kept, in the order the decisions are listed."""
        return tuple(decision.id for decision in self.decisions if decision.admitted)


def decide(
    view: ReplicaView, candidates: Sequence[Prefill], policy: Policy = Policy.MH, settings: PlanSettings | None = None
) -> Decisions:
    """Decide on `candidates` and on the unpromised prefills of the view, together.

    Decisions come in the order: unpromised prefills of the view, then candidates. Prefills of tier -1 are ignored.
    """
    return _Deciding(view, candidates, policy, settings or PlanSettings()).run()


class _Deciding:
    """One decision in progress: arrays of everything with a tier, in deadline order."""

    def __init__(
        self, view: ReplicaView, candidates: Sequence[Prefill], policy: Policy, settings: PlanSettings
    ) -> None:
        self.view, self.policy, self.settings = view, policy, settings
        self.columns = columns_of(view.decoders)
        self.asked = [p for p in (*view.prefills, *candidates) if p.tier >= 0 and not p.promised]
        held = [p for p in view.prefills if p.tier >= 0 and p.promised]
        self.items = sorted([*held, *self.asked], key=lambda p: p.deadline_s)
        self.queue = queue_of(self.items)
        self.tiers = tiers_of(self.columns, self.items, settings)
        self.coef = np.array(view.model.rows)
        self.rules = rules_of(view, settings)
        c = self.columns
        self.base = sim.prepare(
            self.coef,
            view.start_s,
            self.rules.margin_s,
            c.tier,
            c.next_deadline_s,
            c.context_tokens,
            c.remaining_tokens,
            self.tiers,
        )
        self.cap_s = settings.caps_s[0]
        self.why: dict[int, Constraint] = {}

    def run(self) -> Decisions:
        """Start from what is promised and add what fits."""
        active = self.queue.promised.astype(np.int64)
        base_feasible = self._settle(active)
        waiting = [j for j, item in enumerate(self.items) if not item.promised]
        for j in waiting:
            hopeless = self._hopeless(j)
            if hopeless is not None:
                self.why[j] = hopeless
                continue
            active[j] = 1
            found = self._first_problem(active)
            if found is not None:
                active[j] = 0
                self.why[j] = found
        outcome = self._simulate(active)
        rows = {item.id: j for j, item in enumerate(self.items)}
        answers = tuple(self._answer(rows[item.id], active, outcome) for item in self.asked)
        return Decisions(answers, self.cap_s, base_feasible)

    def _settle(self, active: Ints) -> bool:
        """Mark promised prefills that are late already, so that they do not count against candidates."""
        fine = True
        while (outcome := self._simulate(active)).code == sim.MISS_DEADLINE:
            active[outcome.row] = 2
            fine = False
        return fine and outcome.code == sim.FEASIBLE

    def _simulate(self, active: Ints) -> sim.Outcome:
        return sim.simulate(
            self.coef, self.view.start_s, self.cap_s, self.rules, self.tiers, self.base, self.queue, active
        )

    def _forecast(self, active: Ints, joined: Ints) -> Forecast:
        c = self.columns
        return forecast_steps(
            self.coef,
            self.view.block_size,
            c.tier,
            c.context_tokens,
            c.remaining_tokens,
            self.tiers,
            self.queue,
            active,
            joined,
        )

    def _hopeless(self, j: int) -> Constraint | None:
        item, start_s = self.items[j], self.view.start_s
        tokens = self.base.number.sum(axis=0)[0]
        alone_s = seconds(
            self.coef, tokens + item.remaining_tokens, self.base.context[0] + item.computed_tokens, tokens + 1, 0
        )
        left_s = item.deadline_s - start_s - self.rules.margin_s - self.settings.hopeless_margin_s
        if alone_s <= left_s + 1e-9:
            return None
        return Constraint(ConstraintKind.HOPELESS, alone_s, left_s, "s", start_s, item.deadline_s, item.tier, item.id)

    def _first_problem(self, active: Ints) -> Constraint | None:
        seats = len(self.columns.ids) + int((active > 0).sum())
        if seats > self.view.max_num_seqs:
            return Constraint(ConstraintKind.MAX_SEQS, seats, self.view.max_num_seqs, "requests")
        outcome = self._simulate(active)
        if outcome.code == sim.MISS_TPOT:
            tpot_s = float(self.tiers.tpot[outcome.row])
            return Constraint(ConstraintKind.TPOT, tpot_s, tpot_s, "s", tier=int(outcome.row))
        if outcome.code == sim.MISS_DEADLINE:
            late = self.items[outcome.row]
            due = (active > 0) & (self.queue.deadline <= late.deadline_s)
            needed = int(self.queue.remaining[due].sum())
            return Constraint(
                ConstraintKind.PREFILL_BUDGET,
                needed,
                math.nan,
                "tokens",
                self.view.start_s,
                late.deadline_s,
                late.tier,
                late.id,
            )
        ahead = self._forecast(active, outcome.joined)
        if ahead.peak_blocks > self.view.total_blocks:
            return Constraint(ConstraintKind.KV_BLOCKS, ahead.peak_blocks, self.view.total_blocks, "blocks")
        if ahead.excess_s > 1e-9:
            tpot_s = float(self.tiers.tpot[ahead.excess_row] * self.tiers.gain[ahead.excess_row])
            return Constraint(ConstraintKind.TPOT, tpot_s + ahead.excess_s, tpot_s, "s", tier=int(ahead.excess_row))
        return None

    def _answer(self, j: int, active: Ints, outcome: sim.Outcome) -> Decision:
        item = self.items[j]
        finish_s = float(outcome.finish_s[j])
        if not active[j]:
            alone = active.copy()
            alone[j] = 2
            finish_s = float(self._simulate(alone).finish_s[j])
        shape = (self.columns.tier >= 0).sum() + (active > 0).sum()
        tpot_s = seconds(self.coef, shape, self.base.context[0], shape, 0)
        return Decision(
            item.id, bool(active[j]), finish_s, finish_s - item.arrival_s, max(tpot_s, 0.0), self.why.get(j, FITS)
        )
