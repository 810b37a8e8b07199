"""The best-effort queue: its order, its ageing, and when a worker pulls from it.

Order is by age, with short requests slightly ahead: a request counts as older by the time it has waited and younger by
the prefill time it asks for. Nothing starves, because waiting always wins in the end. A request whose SLO is still
attainable goes first while it is, so that it can be promoted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BEST_EFFORT_PATIENCE_S", "BestEffortEntry", "longest_waiting", "may_pull", "order_entries", "to_hand_back"]

BEST_EFFORT_PATIENCE_S = 30.0
"""How long best effort waits for what is left over, by default."""


@dataclass(frozen=True, slots=True)
class BestEffortEntry:
    """A waiting best-effort request. `deadline_s` is the first-token deadline it once asked for (inf: none)."""

    id: str
    enqueued_s: float
    prompt_tokens: int
    deadline_s: float = math.inf
    started: bool = False


def order_entries(
    entries: Sequence[BestEffortEntry], now_s: float, *, prefill_s_per_token: float, patience: float = 10.0
) -> list[BestEffortEntry]:
    """Entries in the order to run them.

    A request is worth `waited - patience * prefill time`: one that needs a second of prefill goes behind a short one
    until it has waited `patience` seconds longer. Entries that could still meet their deadline come first, by deadline.
    """

    def key(entry: BestEffortEntry) -> tuple[bool, float, float, str]:
        prefill_s = entry.prompt_tokens * prefill_s_per_token
        attainable = now_s + prefill_s <= entry.deadline_s < math.inf
        aged = (now_s - entry.enqueued_s) - patience * prefill_s
        return (not attainable, entry.deadline_s if attainable else 0.0, -aged, entry.id)

    return sorted(entries, key=key)


def may_pull(
    *, unprefilled_tokens: int, batch_tokens: int, prompt_tokens: int, forecast_free_blocks: int, block_size: int
) -> bool:
    """Whether a worker may take one more best-effort request from the shared queue.

    It may while the best-effort requests in the engine that are not yet prefilled hold less than two batches' worth of
    tokens, and the forecast of free blocks (after reservations) exceeds the candidate's prompt.
    """
    return unprefilled_tokens < 2 * batch_tokens and forecast_free_blocks * block_size > prompt_tokens


def longest_waiting(arrivals_s: Mapping[str, float], now_s: float, patience_s: float) -> str | None:
    """The request whose turn it is to be planned although nothing is left over; None while all are within patience.

    Leftovers may be nothing for as long as promises fill a replica. Therefore the oldest request past `patience_s` is
    planned among the promises, one at a time: what it costs is bounded, and everybody's turn comes.
    """
    due = [(arrival_s, request_id) for request_id, arrival_s in arrivals_s.items() if now_s - arrival_s > patience_s]
    return min(due)[1] if due else None


def to_hand_back(entries: Sequence[BestEffortEntry], needed_blocks: int, block_size: int) -> list[str]:
    """Ids of un-started best-effort entries to give back, newest first, until `needed_blocks` are spoken for."""
    given: list[str] = []
    for entry in sorted((e for e in entries if not e.started), key=lambda e: -e.enqueued_s):
        if needed_blocks <= 0:
            break
        given.append(entry.id)
        needed_blocks -= -(-entry.prompt_tokens // block_size)
    return given
