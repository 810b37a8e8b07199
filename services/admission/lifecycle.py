"""The life of a request in this process, as a table.

    PLACING --placed--> WAITING --tokens--> STREAMING --finished--> FINISHED
                           ^                    |
                           +--replaced-- REPLACING  (its worker was lost)

A signal that the table does not name for a state is ignored: it is late. Tokens may overtake the placement's answer.
"""

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["TRANSITIONS", "Signal", "State", "next_state"]


class State(StrEnum):
    """Where a request stands."""

    PLACING = "placing"
    WAITING = "waiting"
    STREAMING = "streaming"
    REPLACING = "replacing"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    ended: bool
    """True where nothing more will be generated."""

    def __init__(self, word: str) -> None:
        self.ended = word in ("finished", "cancelled", "failed")


class Signal(StrEnum):
    """What can happen to it."""

    PLACED = "placed"
    TOKENS = "tokens"
    LOST = "lost"
    REPLACED = "replaced"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


_ENDS = {Signal.FINISHED: State.FINISHED, Signal.CANCELLED: State.CANCELLED, Signal.FAILED: State.FAILED}

TRANSITIONS: Mapping[State, Mapping[Signal, State]] = {
    State.PLACING: {**_ENDS, Signal.PLACED: State.WAITING, Signal.TOKENS: State.STREAMING},
    State.WAITING: {**_ENDS, Signal.TOKENS: State.STREAMING, Signal.LOST: State.REPLACING},
    State.STREAMING: {
        **_ENDS,
        Signal.PLACED: State.STREAMING,
        Signal.TOKENS: State.STREAMING,
        Signal.LOST: State.REPLACING,
        Signal.REPLACED: State.STREAMING,
    },
    State.REPLACING: {**_ENDS, Signal.REPLACED: State.WAITING, Signal.TOKENS: State.STREAMING},
    State.FINISHED: {},
    State.CANCELLED: {},
    State.FAILED: {},
}


def next_state(state: State, signal: Signal) -> State | None:
    """The state after `signal`, None where it comes too late to matter."""
    return TRANSITIONS[state].get(signal)
