"""Pausing decoders that are ahead of their deadlines, so that memory serves more requests than it holds at once.

A decoder that runs faster than its TPOT gets ahead: its next token is not due for a while. For that long it can do
without its KV blocks. Paused, it gives them up; later its context is computed again, like a prompt whose first token is
due when its next token is, early enough that no token is late. Every token keeps the deadline it had.

What that is worth: a decoder with r tokens to go, one per batch of `pace_s`, has r * TPOT plus what it is ahead by to
make them in, so it needs its blocks for only

    share = r * pace_s / (r * TPOT + ahead)

of that time. Promised requests can therefore hold sum(blocks) / sum(blocks * share) times the memory between them, as
long as a few tokens of each find room at any moment. It pays for long outputs only: one that ends soon frees its blocks
by itself, and computing a context again takes time from prefills.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.core.columns import DecoderColumns, Floats, Ints
from services.core.perf_model import BatchShape, PerfModel

__all__ = ["PauseRule", "ahead_s", "lead_s", "overcommitment", "pace_s", "pausable_rows"]

_SLOWER = 1.05  # than decoders alone: what a prefill now and then costs


@dataclass(frozen=True, slots=True)
class PauseRule:
    """When a decoder may be paused, and how far memory is promised beyond what there is.

    least_s: a shorter pause is not worth it; nor is one of a decoder that would end within twice that time.
    share: of what pausing could add in theory, as much is promised. most: times the memory, at most.
    growth_tokens: memory is promised beyond what there is, and a paused request taken back early, only where so many
        more tokens of every decoder find room.
    """

    least_s: float = 10.0
    share: float = 0.9
    most: float = 3.0
    growth_tokens: int = 128


def pace_s(model: PerfModel, decoders: int, context_tokens: int) -> float:
    """Seconds per token of so many decoders with so much context between them, nearly alone."""
    return _SLOWER * model.seconds(BatchShape(decoders, context_tokens, decoders))


def lead_s(model: PerfModel, context_tokens: Ints, cap_s: float) -> Floats:
    """How long before its next token is due a paused request must begin to be computed again, by its context.

    Twice its own time, because its batches have others in them, and three of the longest batches (`cap_s`): the one
    under way, and the rounding at both ends.
    """
    lead: Floats = 2 * model.rows[0][0] * context_tokens + np.float64(3 * cap_s)
    return lead


def ahead_s(columns: DecoderColumns, now_s: float) -> Floats:
    """How far each decoder is ahead of its next deadline; 0 for one that is late."""
    ahead: Floats = np.maximum(0.0, columns.next_deadline_s - now_s)
    return ahead


def _lasting(columns: DecoderColumns, pace: float, rule: PauseRule) -> NDArray[np.bool_]:
    """Promised decoders that will run long enough for a pause to be worth it."""
    lasting: NDArray[np.bool_] = (columns.tier >= 0) & columns.promised
    return lasting & (columns.remaining_tokens * pace >= 2 * rule.least_s)


def pausable_rows(
    columns: DecoderColumns, now_s: float, model: PerfModel, cap_s: float, pace: float, rule: PauseRule
) -> list[int]:
    """Rows of decoders that may be paused now, the one with the longest pause first. `pace`: seconds per token."""
    pause_s = ahead_s(columns, now_s) - lead_s(model, columns.context_tokens, cap_s)
    rows = np.flatnonzero(_lasting(columns, pace, rule) & (pause_s > rule.least_s))
    ordered: list[int] = rows[np.argsort(-pause_s[rows], kind="stable")].tolist()
    return ordered


def overcommitment(columns: DecoderColumns, now_s: float, pace: float, rule: PauseRule) -> float:
    """How many times the memory these decoders may hold between them when they are paused in turns; at least 1.

    `pace`: seconds per token while they decode. Blocks are weighed as they will be at the forecast end.
    """
    rows = columns.on_tier.rows
    if len(rows) == 0:
        return 1.0
    left_s = np.maximum(1e-9, columns.remaining_tokens * columns.tpot_s + ahead_s(columns, now_s))
    share = np.minimum(1.0, columns.remaining_tokens * pace / left_s)
    share = np.where(_lasting(columns, pace, rule), share, 1.0)[rows]
    blocks = (columns.context_tokens + columns.remaining_tokens)[rows]
    gain = min(rule.most, float(blocks.sum() / max(1.0, (blocks * share).sum())))
    return 1.0 + rule.share * max(0.0, gain - 1.0)
