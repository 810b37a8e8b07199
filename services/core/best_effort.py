"""The best-effort queue: its order, its ageing, and when a worker pulls from it.

Order is by age, with short requests slightly ahead: a request counts as older by the time it has waited and younger by
the prefill time it asks for. Nothing starves, because waiting always wins in the end. A request whose SLO is still
attainable goes first while it is, so that it can be promoted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BestEffortEntry", "may_pull", "order_entries", "to_hand_back"]


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


def to_hand_back(entries: Sequence[BestEffortEntry], needed_blocks: int, block_size: int) -> list[str]:
    """Ids of un-started best-effort entries to give back, newest first, until `needed_blocks` are spoken for."""
    given: list[str] = []
    for entry in sorted((e for e in entries if not e.started), key=lambda e: -e.enqueued_s):
        if needed_blocks <= 0:
            break
        given.append(entry.id)
        needed_blocks -= -(-entry.prompt_tokens // block_size)
    return given
