"""One planning problem as arrays: the input of every compiled kernel, built once per decision."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from services.core.columns import (
    DecoderColumns,
    Floats,
    Ints,
    Queue,
    TierColumns,
    queue_of,
    tiers_of,
    with_verified,
)
from services.core.compiled import compiled, seconds
from services.core.view import PlanSettings, Prefill, ReplicaView

__all__ = ["EPS_S", "Base", "Limits", "Problem", "problem_of", "with_lengths", "with_spend"]

EPS_S = 1e-9
"""Times closer than this are equal: far above float error, far below anything an engine can do."""


class Limits(NamedTuple):
    """Numbers a plan must respect. `blocks` and `seats` are what promised work may use."""

    margin_s: float
    min_prefill_tokens: int
    max_batch_tokens: int
    hold_first_token: bool
    early_spend: float
    block_size: int
    blocks: int
    seats: int


class Base(NamedTuple):
    """Decoders on tiers, sorted by remaining steps; column p of the tables sums up those from position p on.

    Tiers come twice as table rows: row t for decoders in time, row n + t for those already late, which must hurry
    but can no longer be harmed. `least` is relative to the start of the plan, margin taken off. `most_context` is no
    less than the context of all decoders at their ends, `most_blocks` than the blocks they hold then.

    With drafts a request's last step brings what is left of it, which may be fewer tokens than others and then due
    earlier: `last_due` is when, the earliest among those with as many steps from position p on, and `last_tier` whose
    that is (infinite and -1 for those whose steps bring one token anyway, and for the late).
    """

    steps: Ints
    tier: Ints
    length: Ints
    number: Ints
    least: Floats
    context: Floats
    last_due: Floats
    last_tier: Ints
    most_context: float
    most_blocks: float


class Problem(NamedTuple):
    """A replica at the moment its next batch starts, and the prefills in question, in deadline order."""

    coef: Floats
    attention: float
    start_s: float
    limits: Limits
    tiers: TierColumns
    base: Base
    queue: Queue


def problem_of(
    view: ReplicaView, columns: DecoderColumns, items: Sequence[Prefill], settings: PlanSettings, early_spend: float
) -> Problem:
    """The arrays of a view; `items` are the prefills on tiers, already in deadline order."""
    coef = view.model.coef
    tiers = tiers_of(columns, items, settings)
    limits = Limits(
        settings.margin_s + view.model.margin_s,
        settings.min_prefill_tokens,
        settings.max_batch_tokens,
        settings.hold_first_token,
        early_spend,
        view.block_size,
        view.total_blocks - _held_elsewhere(view, columns),
        view.max_num_seqs,
    )
    return Problem(
        coef,
        view.model.attention,
        view.start_s,
        limits,
        tiers,
        _base(coef, view.start_s, limits, columns, tiers),
        queue_of(items),
    )


def with_lengths(problem: Problem, columns: DecoderColumns, settings: PlanSettings) -> Problem:
    """The same problem with the draft lengths of `settings`."""
    tiers = with_verified(problem.tiers.tpot, settings)
    base = _base(problem.coef, problem.start_s, problem.limits, columns, tiers)
    return problem._replace(tiers=tiers, base=base)


def with_spend(problem: Problem, columns: DecoderColumns, early_spend: float) -> Problem:
    """The same problem with another share of the TPOT budget that may be spent early."""
    limits = problem.limits._replace(early_spend=early_spend)
    base = _base(problem.coef, problem.start_s, limits, columns, problem.tiers)
    return problem._replace(limits=limits, base=base)


def _base(coef: Floats, start_s: float, limits: Limits, columns: DecoderColumns, tiers: TierColumns) -> Base:
    c = columns
    return _sort_decoders(coef, start_s, limits, c.tier, c.next_deadline_s, c.context_tokens, c.remaining_tokens, tiers)


def _held_elsewhere(view: ReplicaView, columns: DecoderColumns) -> int:
    """Blocks in use by nothing in the view, for instance the KV of sessions between two rounds."""
    size = view.block_size
    known = int((-(-columns.context_tokens // size)).sum())
    known += sum(-(-p.computed_tokens // size) for p in view.prefills if p.computed_tokens)
    return max(0, view.total_blocks - view.free_blocks - known)


@compiled
def _sort_decoders(
    coef: Floats,
    start_s: float,
    limits: Limits,
    tier: Ints,
    deadline: Floats,
    context: Ints,
    remaining: Ints,
    tiers: TierColumns,
) -> Base:
    num_tiers = tiers.tpot.shape[0]
    rows = np.nonzero(tier >= 0)[0]
    n = rows.shape[0]
    steps = np.empty(n, np.int64)
    tokens = 0
    total_context = 0.0
    most_context = 0.0
    draft = 0
    for i in range(n):
        r = rows[i]
        steps[i] = max(1, int(np.ceil(remaining[r] / tiers.gain[tier[r]] - 1e-9)))
        tokens += tiers.verify[tier[r]]
        draft = max(draft, tiers.verify[tier[r]] - 1)
        total_context += context[r]
        most_context += context[r] + steps[i] * tiers.gain[tier[r]]
    most_blocks = (most_context + tokens) / limits.block_size + n
    shortest = seconds(coef, tokens, total_context, n, draft)
    order = np.argsort(steps)
    sorted_tier = np.empty(n, np.int64)
    length = np.empty(n, np.int64)
    number = np.zeros((2 * num_tiers, n + 1), np.int64)
    least = np.full((2 * num_tiers, n + 1), np.inf)
    from_context = np.zeros(n + 1)
    last_due = np.full(n, np.inf)
    last_tier = np.full(n, -1, np.int64)
    for p in range(n - 1, -1, -1):
        r = rows[order[p]]
        c = tier[r]
        spend = limits.early_spend * tiers.tpot[c] * max(0, remaining[r] - 1)
        # The tokens of one step come together: the step is due when the last of those it is expected to yield is.
        burst = (min(tiers.gain[c], max(1.0, remaining[r])) - 1.0) * tiers.tpot[c]
        slack = deadline[r] - start_s - limits.margin_s + spend + burst
        row = c if slack >= shortest - EPS_S else num_tiers + c
        for q in range(2 * num_tiers):
            number[q, p] = number[q, p + 1]
            least[q, p] = least[q, p + 1]
        number[row, p] += 1
        least[row, p] = min(least[row, p], slack)
        if row == c and tiers.gain[c] != 1.0:
            last_due[p] = deadline[r] - start_s - limits.margin_s + max(0, remaining[r] - 1) * tiers.tpot[c]
            last_tier[p] = c
        if p + 1 < n and steps[order[p + 1]] == steps[order[p]] and last_due[p + 1] < last_due[p]:
            last_due[p] = last_due[p + 1]
            last_tier[p] = last_tier[p + 1]
        from_context[p] = from_context[p + 1] + context[r]
        sorted_tier[p] = c
        length[p] = context[r]
    return Base(
        steps[order], sorted_tier, length, number, least, from_context, last_due, last_tier, most_context, most_blocks
    )
