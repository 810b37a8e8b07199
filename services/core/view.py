"""What the core sees of one replica, and the settings it plans with. Values only; all times are monotonic seconds.

Tiers are indices: 0..n-1 as configured, `BEST_EFFORT_TIER` (-1) for work without a promise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from services.core.errors import BadViewError
from services.core.perf_model import PerfModel
from services.core.speculation import MAX_VERIFY_TOKENS

__all__ = [
    "BEST_EFFORT_TIER",
    "EARLY_SPEND",
    "SERVING_ORDER",
    "Decoder",
    "PlanSettings",
    "Prefill",
    "ReplicaView",
    "check_prefill",
    "check_view",
]

BEST_EFFORT_TIER = -1

EARLY_SPEND = 0.10
"""The share of the remaining TPOT budget that services let decoders be late by in a conflict, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A request that has its first token and wants the next one.

    `next_deadline_s` is when its next token is due (ignored for best effort); `remaining_tokens` is the forecast of
    what it will still produce, at least 1.
    """

    id: str
    tier: int
    next_deadline_s: float
    tpot_s: float
    context_tokens: int
    remaining_tokens: int
    promised: bool = True


@dataclass(frozen=True, slots=True)
class Prefill:
    """A request without its first token: a started or waiting prefill, or a candidate for admission.

    `deadline_s` is when its first token is due; `output_tokens` the forecast length of its decode. `weight` (a
    positive integer) is what keeping it is worth, `application` names the class of traffic for floors.
    `arrival_s` only serves to state TTFTs; NaN if unknown. Once it decodes, its tokens are due `in_hand_s` before their
    SLO is missed.
    """

    id: str
    tier: int
    deadline_s: float
    tpot_s: float
    prompt_tokens: int
    computed_tokens: int = 0
    output_tokens: int = 1
    promised: bool = False
    started: bool = False
    application: str = ""
    weight: int = 1
    arrival_s: float = math.nan
    in_hand_s: float = 0.0

    @property
    def remaining_tokens(self) -> int:
        """Prompt tokens still to compute; at least 1, because the last one yields the first output token."""
        return max(1, self.prompt_tokens - self.computed_tokens)


SERVING_ORDER = attrgetter("deadline_s", "id")
"""Sort key of prefills: by deadline, equal ones by id."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at one moment.

    `engine_free_at_s` is when the batches already in flight end (`now_s` or earlier if none). `free_blocks` counts
    KV blocks the engine could allocate now. Best-effort work is listed with tier -1.
    """

    now_s: float
    model: PerfModel
    decoders: Sequence[Decoder]
    prefills: Sequence[Prefill]
    free_blocks: int
    total_blocks: int
    block_size: int = 16
    max_num_seqs: int = 512
    engine_free_at_s: float = -math.inf

    @property
    def start_s(self) -> float:
        """When the next batch can start."""
        return max(self.now_s, self.engine_free_at_s)

    def with_prefills(self, prefills: Sequence[Prefill]) -> "ReplicaView":
        """The same replica with other prefills, for instance those a decision kept."""
        return replace(self, prefills=prefills)


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How the core plans.

    caps_s: limits on a batch's duration while promises wait; the first is the default, the others are tried when the
        plan under the first misses a deadline.
    margin_s: safety on every decode and first-token deadline, on top of the model's own margin.
    min_prefill_tokens: every batch has room for this many prefill tokens beside the decoders.
    max_batch_tokens: the engine's own limit on tokens per batch.
    best_effort_cap_s: limit on a batch that only best effort would lengthen, or 1.6 fixed costs of a batch where that
        is more; 0: no best effort.
    cap_lapsed: no promise was made recently, so that best effort may fill batches of `max_batch_tokens`.
    hold_first_token: the output path holds first tokens until their deadline, which banks slack for decoding.
    early_spend: on conflict, the share of the remaining TPOT budget that decoders may be late by in between and
        catch up until their end (mean TPOT still holds); 0 keeps every single token in time.
    hopeless_margin_s: a waiting prefill is hopeless once it could not finish alone this long before its deadline.
    verify_tokens: verified tokens per decoder and step, by tier (empty: 1, or chosen where `acceptance` is given).
    acceptance: expected acceptance rate of draft tokens, by tier (empty: 0).
    max_verify_tokens: where they are chosen, the most tokens that the engine verifies per decoder and step.
    """

    caps_s: tuple[float, ...] = (0.100, 0.140, 0.200)
    margin_s: float = 0.0
    min_prefill_tokens: int = 16
    max_batch_tokens: int = 8192
    best_effort_cap_s: float = 0.040
    cap_lapsed: bool = False
    hold_first_token: bool = False
    early_spend: float = 0.0
    hopeless_margin_s: float = 0.0
    verify_tokens: tuple[int, ...] = field(default=())
    acceptance: tuple[float, ...] = field(default=())
    max_verify_tokens: int = MAX_VERIFY_TOKENS

    def verify(self, tier: int) -> int:
        """Verified tokens per step of a tier's decoders; 1 without speculation."""
        return self.verify_tokens[tier] if 0 <= tier < len(self.verify_tokens) else 1

    def acceptance_rate(self, tier: int) -> float:
        """Expected acceptance rate of a tier's draft tokens."""
        return self.acceptance[tier] if 0 <= tier < len(self.acceptance) else 0.0


def check_view(view: ReplicaView) -> None:
    """Refuse a view that contradicts itself, with BadViewError naming what is wrong."""
    if not math.isfinite(view.now_s) or math.isnan(view.engine_free_at_s):
        raise BadViewError(f"now_s is {view.now_s}, engine_free_at_s {view.engine_free_at_s}")
    if view.block_size < 1 or view.max_num_seqs < 1 or not 0 <= view.free_blocks <= view.total_blocks:
        raise BadViewError(
            f"{view.free_blocks} of {view.total_blocks} blocks of {view.block_size} tokens free, "
            f"{view.max_num_seqs} requests at most"
        )
    seen: set[str] = set()
    for decoder in view.decoders:
        _check_decoder(decoder)
        seen.add(decoder.id)
    for prefill in view.prefills:
        check_prefill(prefill)
        seen.add(prefill.id)
    if len(seen) < len(view.decoders) + len(view.prefills):
        raise BadViewError("a request id appears twice")


def check_prefill(prefill: Prefill) -> None:
    """Refuse a prefill or candidate whose numbers mean nothing, with BadViewError."""
    _check_tier(prefill.id, prefill.tier, prefill.deadline_s, prefill.tpot_s)
    if prefill.prompt_tokens < 1 or not 0 <= prefill.computed_tokens <= prefill.prompt_tokens:
        raise BadViewError(
            f"request {prefill.id}: {prefill.computed_tokens} of {prefill.prompt_tokens} tokens computed"
        )
    if prefill.output_tokens < 1 or prefill.weight < 1:
        raise BadViewError(f"request {prefill.id}: output forecast {prefill.output_tokens}, weight {prefill.weight}")


def _check_decoder(decoder: Decoder) -> None:
    _check_tier(decoder.id, decoder.tier, decoder.next_deadline_s, decoder.tpot_s)
    if decoder.context_tokens < 0 or decoder.remaining_tokens < 0:
        raise BadViewError(
            f"request {decoder.id}: context {decoder.context_tokens}, remaining {decoder.remaining_tokens}"
        )


def _check_tier(request_id: str, tier: int, deadline_s: float, tpot_s: float) -> None:
    if tier < BEST_EFFORT_TIER:
        raise BadViewError(f"request {request_id}: tier {tier}")
    if tier >= 0 and not (math.isfinite(deadline_s) and math.isfinite(tpot_s) and tpot_s > 0):
        raise BadViewError(f"request {request_id}: deadline {deadline_s}, TPOT {tpot_s}")
