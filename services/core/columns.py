"""Struct-of-arrays form of a replica view: what the compiled kernels read.

`DecoderColumns` is also the fast way in: a caller that keeps its running requests in arrays passes one as
`ReplicaView.decoders` and no per-request object is ever built.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from services.core.compiled import compiled
from services.core.speculation import expected_tokens
from services.core.view import Decoder, PlanSettings, Prefill

__all__ = [
    "DecoderColumns",
    "Floats",
    "Ints",
    "OnTier",
    "Queue",
    "TierColumns",
    "columns_of",
    "decoder_blocks",
    "new_blocks",
    "queue_of",
    "tiers_of",
    "with_verified",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class OnTier(NamedTuple):
    """The running requests that have a tier, summed up: their rows, and what every batch with all of them holds."""

    rows: Ints
    number: int
    context_tokens: int
    due_s: float  # the earliest next deadline; infinite without requests
    numbers: list[int]  # requests of each tier
    tpots_s: list[float]  # the tightest TPOT of each tier; infinite on an empty one


@compiled
def _sum_up(tier: Ints, context: Ints, due_s: Floats, tpot_s: Floats) -> tuple[Ints, int, float, Ints, Floats]:
    """The fields of `OnTier` but the number of rows."""
    tiers = 0
    for c in tier:
        tiers = max(tiers, c + 1)
    rows = np.empty(len(tier), np.int64)
    numbers = np.zeros(tiers, np.int64)
    tpots_s = np.full(tiers, np.inf)
    found = 0
    tokens = 0
    earliest_s = np.inf
    for row in range(len(tier)):
        c = tier[row]
        if c >= 0:
            rows[found] = row
            found += 1
            tokens += context[row]
            earliest_s = min(earliest_s, due_s[row])
            numbers[c] += 1
            tpots_s[c] = min(tpots_s[c], tpot_s[row])
    return rows[:found], tokens, earliest_s, numbers, tpots_s


@compiled
def new_blocks(before: Ints, more: Ints, size: int) -> int:
    """KV blocks of `size` tokens that requests of `before` tokens need for `more` others: for each, or one for all."""
    blocks = 0
    for row in range(len(before)):
        after = before[row] + (more[row] if len(more) > 1 else more[0])
        blocks += -(-after // size) + (-before[row] // size)
    return blocks


@dataclass(frozen=True, slots=True, eq=False)
class DecoderColumns(Sequence[Decoder]):
    """Running requests, one column per field of `Decoder`; reads as a sequence of them."""

    ids: Sequence[str]
    tier: Ints
    next_deadline_s: Floats
    tpot_s: Floats
    context_tokens: Ints
    remaining_tokens: Ints
    promised: NDArray[np.bool_]
    _on_tier: OnTier | None = field(default=None, init=False, repr=False)

    @property
    def on_tier(self) -> OnTier:
        """Summary of the requests with a tier; made once."""
        found = self._on_tier
        if found is None:
            rows, context, due_s, numbers, tpots_s = _sum_up(
                self.tier, self.context_tokens, self.next_deadline_s, self.tpot_s
            )
            found = OnTier(rows, len(rows), context, due_s, numbers.tolist(), tpots_s.tolist())
            object.__setattr__(self, "_on_tier", found)
        return found

    @overload
    def __getitem__(self, index: int) -> Decoder: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Decoder]: ...
    def __getitem__(self, index: int | slice) -> Decoder | Sequence[Decoder]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self.ids)))]
        return Decoder(
            self.ids[index],
            int(self.tier[index]),
            float(self.next_deadline_s[index]),
            float(self.tpot_s[index]),
            int(self.context_tokens[index]),
            int(self.remaining_tokens[index]),
            bool(self.promised[index]),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Decoder]:
        return (self[i] for i in range(len(self.ids)))


class Queue(NamedTuple):
    """Prefills with a tier, in the order they are served."""

    deadline: Floats
    remaining: Ints
    computed: Ints
    tier: Ints
    output: Ints
    promised: NDArray[np.bool_]
    weight: Ints
    in_hand: Floats


class TierColumns(NamedTuple):
    """Per tier: TPOT, verified tokens per decoder and step, and the tokens a step is expected to yield."""

    tpot: Floats
    verify: Ints
    gain: Floats


def columns_of(decoders: Sequence[Decoder]) -> DecoderColumns:
    """The columns of running requests; free if they already are columns."""
    if isinstance(decoders, DecoderColumns):
        return decoders
    return DecoderColumns(
        [d.id for d in decoders],
        np.array([d.tier for d in decoders], np.int64),
        np.array([d.next_deadline_s for d in decoders], np.float64),
        np.array([d.tpot_s for d in decoders], np.float64),
        np.array([d.context_tokens for d in decoders], np.int64),
        np.array([d.remaining_tokens for d in decoders], np.int64),
        np.array([d.promised for d in decoders], np.bool_),
    )


def queue_of(prefills: Sequence[Prefill]) -> Queue:
    """The columns of prefills, in the order given."""
    computed = np.array([p.computed_tokens for p in prefills], np.int64)
    return Queue(
        np.array([p.deadline_s for p in prefills], np.float64),
        np.maximum(1, np.array([p.prompt_tokens for p in prefills], np.int64) - computed),
        computed,
        np.array([p.tier for p in prefills], np.int64),
        np.array([p.output_tokens for p in prefills], np.int64),
        np.array([p.promised for p in prefills], np.bool_),
        np.array([p.weight for p in prefills], np.int64),
        np.array([p.in_hand_s for p in prefills], np.float64),
    )


def decoder_blocks(columns: DecoderColumns, verify: Ints | None, size: int) -> int:
    """KV blocks of `size` tokens that the next step of all requests with a tier needs.

    `verify` is the tokens of each tier's step, drafts included; None is one each.
    """
    rows = columns.on_tier.rows
    everyone = len(rows) == len(columns)
    before = columns.context_tokens if everyone else columns.context_tokens[rows]
    if verify is None:
        return new_blocks(before, np.ones(1, np.int64), size)
    return new_blocks(before, verify[columns.tier if everyone else columns.tier[rows]], size)


def tiers_of(columns: DecoderColumns, prefills: Sequence[Prefill], settings: PlanSettings) -> TierColumns:
    """One row per tier in use. A tier is planned at the tightest TPOT of its members."""
    running = columns.on_tier.tpots_s
    count = max(1, len(running), 1 + max((p.tier for p in prefills), default=-1))
    tpot = [*running, *[math.inf] * (count - len(running))]
    for prefill in prefills:
        tier = prefill.tier
        if tier >= 0 and prefill.tpot_s < tpot[tier]:
            tpot[tier] = prefill.tpot_s
    return with_verified(np.array(tpot), settings)


def with_verified(tpot: Floats, settings: PlanSettings) -> TierColumns:
    """Tiers of these TPOTs, with the tokens that `settings` verify and expect."""
    if not settings.verify_tokens:
        return TierColumns(tpot, np.ones(len(tpot), np.int64), np.ones(len(tpot)))
    verify = [settings.verify(tier) for tier in range(len(tpot))]
    gain = [expected_tokens(verified, settings.acceptance_rate(tier)) for tier, verified in enumerate(verify)]
    return TierColumns(tpot, np.array(verify, np.int64), np.array(gain))
