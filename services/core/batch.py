"""Batch formation: which token goes into the next engine step.

The next batch may last until the earliest decoder deadline (minus the margin) and never longer than the cap; its size
is the model's inverse at that duration. Every decoder on a tier is in it; the rest goes to prefill in deadline order,
then to best effort. A decoder is skipped only where a prefill deadline would otherwise be missed. The first batch of
the simulated plan (`services.core.simulate`) *is* the batch formed here: admission and execution cannot disagree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from services.core import simulate as sim
from services.core.columns import DecoderColumns, Ints, columns_of
from services.core.compiled import seconds, tokens_within
from services.core.feasibility import settle
from services.core.problem import Problem, problem_of, with_spend
from services.core.view import BEST_EFFORT_TIER, PlanSettings, Prefill, ReplicaView

__all__ = ["BatchLimit", "BatchPlan", "Chunk", "form_batch"]


class BatchLimit(StrEnum):
    """What decided how long a batch may last."""

    CAP = "cap"
    SLACK = "slack"
    DEADLINE = "deadline"
    FLOOR = "floor"
    WORK = "work"
    IDLE = "idle"


_LIMITS = {
    sim.LIMIT_CAP: BatchLimit.CAP,
    sim.LIMIT_SLACK: BatchLimit.SLACK,
    sim.LIMIT_DEADLINE: BatchLimit.DEADLINE,
    sim.LIMIT_FLOOR: BatchLimit.FLOOR,
    sim.LIMIT_WORK: BatchLimit.WORK,
}

_WHY = {
    BatchLimit.CAP: "the duration cap",
    BatchLimit.SLACK: "the earliest decoder deadline",
    BatchLimit.DEADLINE: "the first prefill's deadline",
    BatchLimit.FLOOR: "the smallest batch that still moves prefill",
    BatchLimit.WORK: "the work at hand",
    BatchLimit.IDLE: "nothing to run",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """`tokens` prompt tokens of request `id`."""

    id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One engine step.

    `limit_s` is how long the batch may last, `duration_s` the predicted time of what was put in, `token_budget` the
    number of tokens put in. `cap_s` is the cap it was formed under, `limit` what bound it. Decoders on tiers are in
    `decode_ids` or, for this batch only, in `skipped_ids`; prefills in deadline order; best effort apart.
    """

    limit_s: float
    duration_s: float
    token_budget: int
    decode_ids: Sequence[str]
    skipped_ids: Sequence[str]
    prefill: tuple[Chunk, ...]
    best_effort_decode_ids: tuple[str, ...]
    best_effort_prefill: tuple[Chunk, ...]
    cap_s: float
    limit: BatchLimit

    @property
    def why(self) -> str:
        """One sentence on what bound the batch."""
        return (
            f"{self.token_budget} tokens in {self.duration_s * 1e3:.1f} of {self.limit_s * 1e3:.1f} ms, "
            f"bound by {_WHY[self.limit]}"
        )


def form_batch(view: ReplicaView, settings: PlanSettings) -> BatchPlan:
    """The next batch of a replica. Prefills with a tier are all served; whom to admit is `admission.decide`'s job."""
    columns = columns_of(view.decoders)
    queue = sorted((p for p in view.prefills if p.tier >= 0), key=lambda p: p.deadline_s)
    problem = problem_of(view, columns, queue, settings, 0.0)
    outcome, cap_s = _first_feasible(problem, columns, settings)
    return _Former(view, settings, columns, problem).fill(queue, outcome, cap_s)


def _first_feasible(problem: Problem, columns: DecoderColumns, settings: PlanSettings) -> tuple[sim.Outcome, float]:
    """The plan under the first cap that keeps every deadline, early spending last; else the default, late ones last."""
    rows = len(problem.queue.tier)
    spends = (0.0, settings.early_spend) if settings.early_spend > 0 else (0.0,)
    for spend in spends:
        trial = problem if spend == 0 else with_spend(problem, columns, spend)
        for cap_s in settings.caps_s:
            outcome = sim.simulate(trial, np.ones(rows, np.int64), cap_s)
            if outcome.code != sim.MISS_DEADLINE:
                return outcome, cap_s
    cap_s, standing = settings.caps_s[0], np.ones(rows, np.int64)
    settle(problem, standing, cap_s, np.full(rows, np.inf))
    return sim.simulate(problem, standing, cap_s), cap_s


class _Former:
    """Turns the first batch of a simulated plan into ids and fills what is left with best effort."""

    def __init__(self, view: ReplicaView, settings: PlanSettings, columns: DecoderColumns, problem: Problem) -> None:
        self.view, self.settings, self.columns = view, settings, columns
        self.coef, self.tiers = problem.coef, problem.tiers
        tiers = problem.tiers
        tier = columns.tier.tolist()
        self.decode_ids = [i for i, t in zip(columns.ids, tier, strict=True) if t >= 0]
        self.best_effort_rows = [r for r, t in enumerate(tier) if t < 0]
        on_tier = columns.tier[columns.tier >= 0]
        self.tokens = int(tiers.verify[on_tier].sum())
        self.draft = int(tiers.verify[on_tier].max(initial=1)) - 1
        self.requests = len(self.decode_ids)
        self.context = int(columns.context_tokens[columns.tier >= 0].sum())
        self.free_blocks = view.free_blocks - self._new_blocks(np.nonzero(columns.tier >= 0)[0])
        self.seats = view.max_num_seqs - len(tier) - sum(p.started for p in view.prefills)

    def fill(self, queue: Sequence[Prefill], outcome: sim.Outcome, cap_s: float) -> BatchPlan:
        """Place prefill chunks, then best-effort decodes, then best-effort prefills."""
        planned = outcome.first_tokens.tolist()
        order = sorted(range(len(queue)), key=lambda j: planned[j] == 0)
        chunks = [self._chunk(queue[j], planned[j]) for j in order if planned[j] > 0]
        prefill = tuple(chunk for chunk in chunks if chunk is not None)
        limit_s, limit = outcome.first_limit_s, _LIMITS[outcome.first_limit]
        waiting = [p for p in self.view.prefills if p.tier == BEST_EFFORT_TIER]
        if not queue:
            limit_s, limit = self._best_effort_limit(bool(waiting or self.best_effort_rows))
        decode_ids, best_effort = self._best_effort(waiting, limit_s)
        if self.tokens == 0:
            limit = BatchLimit.IDLE
        return BatchPlan(
            limit_s, self._seconds(), self.tokens, self.decode_ids, (), prefill, decode_ids, best_effort, cap_s, limit
        )

    def _best_effort_limit(self, any_waiting: bool) -> tuple[float, BatchLimit]:
        """How long a batch without promised prefill may last."""
        shortest = self._seconds() if self.requests else 0.0
        if not any_waiting:
            return shortest, BatchLimit.WORK
        on_tier = self.columns.tier >= 0
        due = self.columns.next_deadline_s[on_tier].min(initial=math.inf)
        slack = float(due) - self.view.start_s - self.settings.margin_s - self.view.model.margin_s
        cap_s = math.inf if self.settings.cap_lapsed else self.settings.best_effort_cap_s
        if slack < cap_s:
            return max(shortest, slack), BatchLimit.SLACK
        return max(shortest, cap_s), BatchLimit.CAP

    def _best_effort(self, waiting: Sequence[Prefill], limit_s: float) -> tuple[tuple[str, ...], tuple[Chunk, ...]]:
        decode_ids: list[str] = []
        for row in self.best_effort_rows:
            context = int(self.columns.context_tokens[row])
            blocks = int(context % self.view.block_size == 0)
            if self._room(limit_s, context) < 1 or blocks > self.free_blocks:
                break
            self._take(1, context)
            self.free_blocks -= blocks
            decode_ids.append(self.columns.ids[row])
        chunks: list[Chunk] = []
        for prefill in waiting:
            tokens = min(prefill.remaining_tokens, self._room(limit_s, prefill.computed_tokens))
            chunk = self._chunk(prefill, tokens)
            if chunk is None:
                break
            chunks.append(chunk)
        return tuple(decode_ids), tuple(chunks)

    def _chunk(self, prefill: Prefill, tokens: int) -> Chunk | None:
        """Put up to `tokens` of a prefill into the batch, as far as KV blocks and seats allow."""
        size = self.view.block_size
        room = (self.free_blocks - (-prefill.computed_tokens // size)) * size - prefill.computed_tokens
        tokens = min(tokens, room)
        if tokens <= 0 or (not prefill.started and self.seats <= 0):
            return None
        self.free_blocks -= -(-(prefill.computed_tokens + tokens) // size) + (-prefill.computed_tokens // size)
        self.seats -= not prefill.started
        self._take(tokens, prefill.computed_tokens)
        return Chunk(prefill.id, tokens)

    def _new_blocks(self, rows: Ints) -> int:
        """KV blocks the decoders of `rows` need for their next tokens."""
        size = self.view.block_size
        before = self.columns.context_tokens[rows]
        after = before + self.tiers.verify[self.columns.tier[rows]]
        return int((-(-after // size) + (-before // size)).sum())

    def _room(self, limit_s: float, context: int) -> int:
        most = tokens_within(self.coef, limit_s + 1e-9, self.context + context, self.requests + 1, self.draft)
        return int(min(most, self.settings.max_batch_tokens)) - self.tokens

    def _take(self, tokens: int, context: int) -> None:
        self.tokens += tokens
        self.requests += 1
        self.context += context

    def _seconds(self) -> float:
        return float(seconds(self.coef, self.tokens, self.context, self.requests, self.draft))
