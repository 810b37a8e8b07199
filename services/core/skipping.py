"""Leaving decoders out of one batch to save a prefill deadline, loosest slack first.

A decoder can wait if, after a batch that lasts until the prefill's deadline, it would still make its own next deadline
in a batch of all decoders. As many wait as the prefill lacks tokens, if that many can.
"""

import math
from dataclasses import replace

import numpy as np

from services.core.columns import DecoderColumns, Ints
from services.core.compiled import seconds, tokens_within
from services.core.problem import Problem

__all__ = ["rows_to_skip", "without_rows"]


def rows_to_skip(problem: Problem, columns: DecoderColumns, late_row: int) -> Ints:
    """Rows of decoders to leave out so that prefill `late_row` and those before it fit until its deadline.

    Empty if none need to or not enough can.
    """
    queue, tiers = problem.queue, problem.tiers
    room_s = float(queue.deadline[late_row]) - problem.limits.margin_s - problem.start_s
    rows = columns.on_tier.rows
    if room_s <= 0 or len(rows) == 0:
        return rows[:0]
    verify = tiers.verify[columns.tier[rows]]
    tokens, draft = int(verify.sum()), int(verify.max()) - 1
    context = float(columns.context_tokens[rows].sum() + queue.computed[: late_row + 1].sum())
    requests = len(rows) + late_row + 1
    before, left = queue.computed[: late_row + 1], queue.remaining[: late_row + 1]
    wanted = tokens + float((left + problem.attention * left * (before + 0.5 * left)).sum())
    lacking = math.ceil(wanted - tokens_within(problem.coef, room_s, context, requests, draft))
    if lacking <= 0:
        return rows[:0]
    next_batch_s = seconds(problem.coef, tokens, context, len(rows), draft)
    slack = columns.next_deadline_s[rows] - problem.start_s - problem.limits.margin_s
    loosest_first = np.argsort(-slack, kind="stable")
    can_wait = loosest_first[slack[loosest_first] >= room_s + next_batch_s]
    freed = np.cumsum(verify[can_wait])
    if len(freed) == 0 or freed[-1] < lacking:
        return rows[:0]
    return rows[can_wait[: int(np.searchsorted(freed, lacking)) + 1]]


def without_rows(columns: DecoderColumns, rows: Ints) -> DecoderColumns:
    """The columns without some rows."""
    keep = np.ones(len(columns), np.bool_)
    keep[rows] = False
    return replace(
        columns,
        ids=[columns.ids[row] for row in np.nonzero(keep)[0].tolist()],
        tier=columns.tier[keep],
        next_deadline_s=columns.next_deadline_s[keep],
        tpot_s=columns.tpot_s[keep],
        context_tokens=columns.context_tokens[keep],
        remaining_tokens=columns.remaining_tokens[keep],
        promised=columns.promised[keep],
    )
