"""From the first batch of a simulated plan to ids: prefill chunks, and best effort in what is left."""

import math
from collections.abc import Sequence

import numpy as np

from services.core import simulate as sim
from services.core.batch_plan import BatchLimit, BatchPlan, Chunk
from services.core.columns import DecoderColumns, Ints, TierColumns, decoder_blocks
from services.core.compiled import seconds
from services.core.prefill_work import chunk_within, work
from services.core.problem import EPS_S
from services.core.view import BEST_EFFORT_TIER, PlanSettings, Prefill, ReplicaView

__all__ = ["Filling"]

_LIMITS = {
    sim.LIMIT_CAP: BatchLimit.CAP,
    sim.LIMIT_SLACK: BatchLimit.SLACK,
    sim.LIMIT_DEADLINE: BatchLimit.DEADLINE,
    sim.LIMIT_FLOOR: BatchLimit.FLOOR,
    sim.LIMIT_WORK: BatchLimit.WORK,
    sim.LIMIT_TOKENS: BatchLimit.TOKENS,
}

_FIXED_COSTS = 1.6


class Filling:
    """Turns the first batch of a simulated plan into ids and fills what is left with best effort."""

    def __init__(
        self,
        view: ReplicaView,
        settings: PlanSettings,
        columns: DecoderColumns,
        tiers: TierColumns,
        skipped_ids: Sequence[str] = (),
    ) -> None:
        self.view, self.settings, self.columns = view, settings, columns
        self.coef, self.attention, self.tiers = view.model.coef, view.model.attention, tiers
        self.margin_s = settings.margin_s + view.model.margin_s
        self.best_effort_cap_s = settings.best_effort_cap_s
        if self.best_effort_cap_s > 0:  # on a slow engine an empty batch alone may take as long
            self.best_effort_cap_s = max(self.best_effort_cap_s, _FIXED_COSTS * seconds(self.coef, 0, 0.0, 0, 0))
        self.skipped_ids = skipped_ids
        self.waiting = [p for p in view.prefills if p.tier == BEST_EFFORT_TIER]
        on_tier = columns.on_tier.rows
        all_on_tier = len(on_tier) == len(columns)
        self.decode_ids = columns.ids if all_on_tier else [columns.ids[row] for row in on_tier.tolist()]
        self.best_effort_rows = () if all_on_tier else np.nonzero(columns.tier < 0)[0].tolist()
        self.requests = columns.on_tier.number
        verify: Ints | None = None  # tokens of each decoder; None: one each
        if max(settings.verify_tokens, default=1) > 1:
            verify = tiers.verify[columns.tier[on_tier]]
        self.tokens = self.requests if verify is None else int(verify.sum())
        self.work = float(self.tokens)
        self.draft = 0 if verify is None else int(verify.max(initial=1)) - 1
        self.context = columns.on_tier.context_tokens
        self.due_s = columns.on_tier.due_s
        drafting = None if verify is None else tiers.verify
        self.free_blocks = view.free_blocks - decoder_blocks(columns, drafting, view.block_size)
        self.missing_blocks = max(0, -self.free_blocks)
        self.seats = view.max_num_seqs - len(columns) - len(skipped_ids) - sum(p.started for p in view.prefills)

    def fill(self, queue: Sequence[Prefill], outcome: sim.Outcome, cap_s: float) -> BatchPlan:
        """Place prefill chunks, then best-effort decodes, then best-effort prefills."""
        planned = outcome.first_tokens.tolist()
        chunks = [self._chunk(prefill, tokens) for prefill, tokens in zip(queue, planned, strict=True) if tokens > 0]
        prefill = tuple(chunk for chunk in chunks if chunk is not None)
        limit_s, limit = outcome.first_limit_s, _LIMITS[outcome.first_limit]
        best_effort_s = min(limit_s, self.best_effort_cap_s)
        return self._plan(prefill, limit_s, limit, best_effort_s, cap_s)

    def fill_without_prefill(self) -> BatchPlan:
        """Place best effort beside the decoders, where no prefill on a tier waits."""
        limit_s, limit = self._best_effort_limit(bool(self.waiting or self.best_effort_rows))
        return self._plan((), limit_s, limit, limit_s, self.settings.caps_s[0])

    def _plan(
        self, prefill: tuple[Chunk, ...], limit_s: float, limit: BatchLimit, best_effort_s: float, cap_s: float
    ) -> BatchPlan:
        decode_ids, best_effort = self._best_effort(self.waiting, best_effort_s)
        return BatchPlan(
            limit_s,
            self._seconds() if self.tokens else 0.0,
            self.tokens,
            self.decode_ids,
            self.skipped_ids,
            prefill,
            decode_ids,
            best_effort,
            cap_s,
            limit if self.tokens else BatchLimit.IDLE,
            self.missing_blocks,
            self.settings.verify_tokens,
        )

    def _best_effort_limit(self, any_waiting: bool) -> tuple[float, BatchLimit]:
        """How long a batch without prefill on tiers may last."""
        shortest = self._seconds() if self.requests else 0.0
        if not any_waiting:
            return shortest, BatchLimit.WORK
        slack_s = self.due_s - self.view.start_s - self.margin_s
        cap_s = math.inf if self.settings.cap_lapsed else self.best_effort_cap_s
        if slack_s < cap_s:
            return max(shortest, slack_s), BatchLimit.SLACK
        return max(shortest, cap_s), BatchLimit.CAP

    def _best_effort(self, waiting: Sequence[Prefill], limit_s: float) -> tuple[tuple[str, ...], tuple[Chunk, ...]]:
        decode_ids: list[str] = []
        for row in self.best_effort_rows:
            context = int(self.columns.context_tokens[row])
            blocks = int(context % self.view.block_size == 0)
            if self._room(limit_s, context, 0) < 1 or blocks > self.free_blocks:
                break
            self._take(1, context, 0)
            self.free_blocks -= blocks
            decode_ids.append(self.columns.ids[row])
        chunks: list[Chunk] = []
        for prefill in waiting:
            tokens = min(
                prefill.remaining_tokens, self._room(limit_s, prefill.computed_tokens, prefill.computed_tokens)
            )
            chunk = self._chunk(prefill, tokens)
            if chunk is None:
                break
            chunks.append(chunk)
        return tuple(decode_ids), tuple(chunks)

    def _chunk(self, prefill: Prefill, tokens: int) -> Chunk | None:
        """Put up to `tokens` of a prefill into the batch, as far as KV blocks and seats allow."""
        size = self.view.block_size
        held = -(-prefill.computed_tokens // size)
        room = (max(0, self.free_blocks) + held) * size - prefill.computed_tokens
        if tokens > room and prefill.tier >= 0:
            self.missing_blocks += -(-(tokens - room) // size)
        tokens = min(tokens, room)
        if tokens <= 0 or (not prefill.started and self.seats <= 0):
            return None
        self.free_blocks -= -(-(prefill.computed_tokens + tokens) // size) - held
        self.seats -= not prefill.started
        self._take(tokens, prefill.computed_tokens, prefill.computed_tokens)
        return Chunk(prefill.id, tokens)

    def _room(self, limit_s: float, context: int, before: int) -> int:
        """Tokens of a request of `context` that still fit; of a prefill, `before` others are computed already."""
        context += self.context
        fitting = chunk_within(
            self.coef,
            self.attention,
            limit_s + EPS_S,
            self.work,
            context,
            self.requests + 1,
            self.draft,
            before,
        )
        return int(min(fitting, self.settings.max_batch_tokens - self.tokens))

    def _take(self, tokens: int, context: int, before: int) -> None:
        self.tokens += tokens
        self.work += work(self.attention, before, tokens)
        self.requests += 1
        self.context += context

    def _seconds(self) -> float:
        return float(seconds(self.coef, self.work, self.context, self.requests, self.draft))
