"""Which promised decoders of one engine are paused; the arithmetic is `services.core.pausing`.

A paused request has lost its blocks and waits in the engine's queue, unseen by the batches that are formed, until its
next token is due soon or memory has come free for it. In plans about who else may be promised it counts as the decoder
that it is, over as much memory as pausing in turns amounts to.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import numpy as np

from services.core.columns import DecoderColumns, columns_of
from services.core.pausing import PauseRule, lead_s, overcommitment, pace_s, pausable_rows
from services.core.perf_model import PerfModel
from services.core.view import Decoder, ReplicaView
from services.worker.decoder_table import DecoderTable
from services.worker.hook_request import TrackedRequest

__all__ = ["Pauses"]


class Pauses:
    """The paused requests of one engine. `rule` None: none ever is."""

    def __init__(self, rule: PauseRule | None) -> None:
        self._rule = rule
        self.count = 0  # of pauses so far
        self._resting: dict[str, TrackedRequest] = {}

    def __len__(self) -> int:
        return len(self._resting)

    def __contains__(self, key: str) -> bool:
        return key in self._resting

    @property
    def keys(self) -> Set[str]:
        """Keys of the paused requests."""
        return self._resting.keys()

    def pause(self, request: TrackedRequest) -> None:
        """A request has lost its blocks and waits."""
        self._resting[request.key] = request
        self.count += 1

    def discard(self, request: TrackedRequest) -> None:
        """It goes on (the engine may have taken it up by itself), ended, or has no promise any more."""
        self._resting.pop(request.key, None)

    def pausable(self, table: DecoderTable, now_s: float, model: PerfModel, cap_s: float) -> list[TrackedRequest]:
        """Decoders that may be paused, the one with the longest pause first."""
        if self._rule is None or not len(table):
            return []
        rows = self._pausable_rows(table.columns(), now_s, model, cap_s)
        requests = (table.requests[row] for row in rows)
        return [request for request in requests if request.promised and request.anchor_s is not None]

    def take_up(self, now_s: float, model: PerfModel, cap_s: float, decoders: int, free_blocks: int, size: int) -> None:
        """Let those go on that are due soon, and those that `free_blocks` of `size` tokens have room for."""
        assert self._rule is not None
        growth = -(-self._rule.growth_tokens // size)
        free = free_blocks - (decoders + 1) * growth
        resting = sorted(self._resting.values(), key=lambda request: request.due_s)
        leads_s = lead_s(model, np.array([request.total_tokens for request in resting], np.int64), cap_s)
        for request, needed_s in zip(resting, leads_s.tolist(), strict=True):
            blocks = -(-request.total_tokens // size)
            if request.due_s - now_s <= needed_s or blocks <= free:
                free -= blocks + growth
                del self._resting[request.key]

    def widened(self, view: ReplicaView, cap_s: float, tier_of: Callable[[TrackedRequest], int]) -> ReplicaView:
        """`view`, the paused requests among its decoders and its memory as large as pausing in turns makes it."""
        rule = self._rule
        columns = columns_of(view.decoders)
        if rule is None or (not self._resting and _holds_all(view, columns)):
            return view
        paused = [_decoder(request, tier_of(request)) for request in self._resting.values()]
        everything = _joined(columns, paused)
        size = view.block_size
        given_up = sum(-(-decoder.context_tokens // size) for decoder in paused)
        rows = self._pausable_rows(columns, view.now_s, view.model, cap_s)
        reclaimable = int((-(-columns.context_tokens[rows] // size)).sum()) if rows else 0
        times = 1.0
        if view.free_blocks + reclaimable >= (len(everything) + 1) * -(-rule.growth_tokens // size):
            times = overcommitment(everything, view.now_s, self._pace_s(view.model, everything), rule)
        total = int(view.total_blocks * times)
        free = max(0, view.free_blocks + total - view.total_blocks - given_up)
        return replace(view, decoders=everything, total_blocks=total, free_blocks=free)

    def _pausable_rows(self, columns: DecoderColumns, now_s: float, model: PerfModel, cap_s: float) -> list[int]:
        assert self._rule is not None
        return pausable_rows(columns, now_s, model, cap_s, self._pace_s(model, columns), self._rule)

    def _pace_s(self, model: PerfModel, columns: DecoderColumns) -> float:
        on_tier = columns.on_tier
        return pace_s(model, on_tier.number, on_tier.context_tokens)


def _decoder(request: TrackedRequest, tier: int) -> Decoder:
    return Decoder(request.key, tier, request.due_s, request.tpot_s, request.total_tokens, request.forecast_left)


def _holds_all(view: ReplicaView, columns: DecoderColumns) -> bool:
    """Whether everything on a tier finds memory at its full length at once: a bound that is cheap to ask."""
    rows = columns.on_tier.rows
    tokens = int((columns.context_tokens[rows] + columns.remaining_tokens[rows]).sum())
    waiting = [prefill for prefill in view.prefills if prefill.tier >= 0]
    tokens += sum(prefill.prompt_tokens + prefill.output_tokens for prefill in waiting)
    return tokens // view.block_size + len(rows) + len(waiting) <= view.total_blocks


def _joined(columns: DecoderColumns, more: Sequence[Decoder]) -> DecoderColumns:
    if not more:
        return columns
    extra = columns_of(more)
    return DecoderColumns(
        [*columns.ids, *extra.ids],
        np.concatenate([columns.tier, extra.tier]),
        np.concatenate([columns.next_deadline_s, extra.next_deadline_s]),
        np.concatenate([columns.tpot_s, extra.tpot_s]),
        np.concatenate([columns.context_tokens, extra.context_tokens]),
        np.concatenate([columns.remaining_tokens, extra.remaining_tokens]),
        np.concatenate([columns.promised, extra.promised]),
    )
