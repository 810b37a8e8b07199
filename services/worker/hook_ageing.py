"""Best effort that has waited too long: one request at a time is planned among the promises until it ends.

It is given a deadline of its own, as far ahead as it has been made to wait at most, and a slow pace; the core must hold
that plan beside every promise, else it is asked again a moment later. Under a load that fills memory for ever no plan
ever holds it: once it has been refused for as long as it waited, it is planned all the same. It is due after what is
promised by then, and new promises are made around it, by the planner too, because it is reported as what it is planned
as: the replica makes fewer until it had its turn. Its client is told nothing: it still has no promise.
"""

from collections.abc import Sequence

from services.core.best_effort import longest_waiting
from services.core.slo import BEST_EFFORT
from services.worker.hook import Hook
from services.worker.hook_request import TrackedRequest
from services.worker.hook_steering import Pool

__all__ = ["Ageing"]

_ASK_EVERY_S = 0.25
AGED_TPOT_S = 0.2


class Ageing:
    """Picks the request whose turn it is. `patience_s`: how long best effort waits for leftovers alone."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._turn: TrackedRequest | None = None
        self._ask_at_s = 0.0
        self._refused: tuple[str, float] = ("", 0.0)  # the request whose turn would be next, and since when it is asked

    def ended(self, request: TrackedRequest) -> None:
        """A request left the engine."""
        if self._turn is request:
            self._turn = None

    def step(self, hook: Hook, now_s: float, waiting: Sequence[TrackedRequest], pool: Pool) -> None:
        """Take up the oldest request past its patience, if it is anybody's turn and the plan holds it."""
        if now_s < self._ask_at_s or (self._turn is not None and self._turn.promised):
            return
        self._ask_at_s = now_s + _ASK_EVERY_S
        held = (*hook.prefilling.values(), *hook.table.requests)
        candidates = {request.key: request for request in (*waiting, *held) if _may_age(request)}
        arrivals_s = {key: request.terms.arrival_s for key, request in candidates.items()}
        key = longest_waiting(arrivals_s, now_s, self._patience_s)
        if key is None:
            return
        if self._refused[0] != key:
            self._refused = key, now_s
        insist = now_s - self._refused[1] >= self._patience_s
        due_s = now_s + self._patience_s
        if hook.age(candidates[key], now_s, due_s, AGED_TPOT_S, waiting, pool, insist=insist):
            self._turn = candidates[key]


def _may_age(request: TrackedRequest) -> bool:
    return not request.on_tier and request.terms.probe is None and BEST_EFFORT not in request.tier_names
