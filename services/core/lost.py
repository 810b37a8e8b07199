"""Promises that can no longer be kept, whatever the next batches contain.

They are named so that they can give way: a request whose promise is lost would otherwise take time from those that can
still be in time. The model's margin is granted to the request here, not taken from it, with what decode deadlines keep
in hand and 2 % more: in doubt a promise stands.
"""

from collections.abc import Mapping

import numpy as np

from services.core.columns import columns_of
from services.core.constraint import Constraint, ConstraintKind
from services.core.perf_model import BatchShape, attended
from services.core.view import ReplicaView

__all__ = ["lost_promises"]

_DOUBT = 0.02  # of a predicted time: a promise that is lost by less may still be kept


def lost_promises(view: ReplicaView, tokens_per_step: float = 1.0, in_hand_s: float = 0.0) -> Mapping[str, Constraint]:
    """Promised requests of the view that miss their SLO in every plan, each with what it lacks.

    A prefill is lost where its first token would be late even if it ran alone beside the decoders in the next batch; a
    decoder where it would still be late at its forecast end if every batch until then held nothing but decoders.
    `tokens_per_step` is what a step yields a decoder, more than 1 with speculation. Decode deadlines of the view lie at
    most `in_hand_s` before those of the promises.
    """
    return {**_lost_prefills(view), **_lost_decoders(view, tokens_per_step, in_hand_s)}


def _lost_prefills(view: ReplicaView) -> dict[str, Constraint]:
    promised = [prefill for prefill in view.prefills if prefill.tier >= 0 and prefill.promised]
    if not promised:
        return {}
    beside = columns_of(view.decoders).on_tier
    largest = BatchShape(
        beside.number + max(prefill.prompt_tokens for prefill in promised),
        beside.context_tokens + max(prefill.computed_tokens for prefill in promised),
        beside.number + 1,
        attended=max(attended(0, prefill.prompt_tokens) for prefill in promised),
    )
    enough_s = (1 - _DOUBT) * view.model.seconds(largest) - view.model.margin_s
    lost: dict[str, Constraint] = {}
    for prefill in promised:
        left_s = prefill.deadline_s - view.start_s
        if left_s >= enough_s:  # for any of them
            continue
        shape = BatchShape(
            beside.number + prefill.remaining_tokens,
            beside.context_tokens + prefill.computed_tokens,
            beside.number + 1,
            attended=attended(prefill.computed_tokens, prefill.remaining_tokens),
        )
        alone_s = view.model.seconds(shape)
        # One that decoded before and computes its context again may be due that long before its SLO is missed.
        if (1 - _DOUBT) * alone_s - view.model.margin_s - prefill.in_hand_s > left_s:
            lost[prefill.id] = Constraint(
                ConstraintKind.HOPELESS, alone_s, left_s, "s", view.now_s, prefill.deadline_s, prefill.tier, prefill.id
            )
    return lost


def _lost_decoders(view: ReplicaView, tokens_per_step: float, in_hand_s: float) -> dict[str, Constraint]:
    columns = columns_of(view.decoders)
    beside = columns.on_tier
    if beside.number == 0:
        return {}
    shortest_s = view.model.seconds(BatchShape(beside.number, beside.context_tokens, beside.number))
    granted_s = view.model.margin_s + in_hand_s
    if beside.due_s - view.start_s + granted_s >= shortest_s:
        return {}  # none is late even now
    rows = np.flatnonzero((columns.tier >= 0) & columns.promised)
    slack_s = columns.next_deadline_s[rows] - view.start_s + granted_s
    late = slack_s < shortest_s
    if not late.any():
        return {}
    tpot_s, remaining = columns.tpot_s[rows], columns.remaining_tokens[rows]
    short_s = (1 - _DOUBT) * shortest_s * np.ceil(remaining / tokens_per_step) - (slack_s + tpot_s * (remaining - 1))
    lost: dict[str, Constraint] = {}
    for index in np.flatnonzero(late & (short_s > 0)).tolist():
        row = int(rows[index])
        ends_s = view.start_s + float(slack_s[index] + tpot_s[index] * (remaining[index] - 1))
        lost[columns.ids[row]] = Constraint(
            ConstraintKind.TPOT,
            shortest_s,
            max(0.0, (ends_s - view.start_s) / int(remaining[index])),
            "s",
            view.now_s,
            ends_s,
            int(columns.tier[row]),
            columns.ids[row],
        )
    return lost
