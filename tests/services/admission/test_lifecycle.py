"""The table of a request's life."""

import pytest

from services.admission.lifecycle import TRANSITIONS, Signal, State, next_state

ENDS = (State.FINISHED, State.CANCELLED, State.FAILED)


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(State)


@pytest.mark.parametrize("state", ENDS)
def test_an_end_is_final(state: State) -> None:
    assert state.ended
    assert all(next_state(state, signal) is None for signal in Signal)


@pytest.mark.parametrize("state", [state for state in State if state not in ENDS])
def test_any_live_request_can_end_in_any_way(state: State) -> None:
    assert not state.ended
    after = {next_state(state, signal) for signal in (Signal.FINISHED, Signal.CANCELLED, Signal.FAILED)}
    assert after == set(ENDS)


def test_a_request_that_is_being_placed_again_is_not_lost_twice() -> None:
    assert next_state(State.STREAMING, Signal.LOST) is State.REPLACING
    assert next_state(State.REPLACING, Signal.LOST) is None
    assert next_state(State.REPLACING, Signal.REPLACED) is State.WAITING


def test_tokens_may_overtake_the_answer_of_a_placement() -> None:
    assert next_state(State.PLACING, Signal.TOKENS) is State.STREAMING
    assert next_state(State.STREAMING, Signal.PLACED) is State.STREAMING
    assert next_state(State.REPLACING, Signal.TOKENS) is State.STREAMING
    assert next_state(State.STREAMING, Signal.REPLACED) is State.STREAMING
