"""Stage boundaries from token ids alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import BadSloError
from services.core.slo import StageKind, StageSlo
from services.core.stages import StageEnd, StageTracker

THINK = StageSlo(StageKind.THINK, 1.0, None, 0.05, 6, end_token_id=9)
CALL = StageSlo(StageKind.TOOL_CALL, None, None, 0.05, 3, end_token_id=8)
ANSWER = StageSlo(StageKind.ANSWER, None, None, 0.1, 4, end_token_id=7)


def test_a_stage_ends_with_its_token_or_its_budget_and_the_last_with_the_request() -> None:
    tracker = StageTracker((THINK, CALL, ANSWER))
    assert tracker.advance([1, 2, 9]) == [StageEnd(0, StageKind.THINK, 3)]
    assert tracker.advance([1, 1]) == []
    assert tracker.advance([1, 7]) == [StageEnd(1, StageKind.TOOL_CALL, 6)]
    assert (tracker.stage_index, tracker.stage_output_tokens, tracker.output_tokens) == (2, 1, 7)
    assert tracker.advance([7, 1, 1, 1]) == []
    assert tracker.finish() == StageEnd(2, StageKind.ANSWER, 11)


def test_an_end_token_of_another_stage_means_nothing() -> None:
    tracker = StageTracker((THINK, ANSWER))
    assert tracker.advance([8, 7, 8]) == []
    assert tracker.current is THINK


@given(st.lists(st.integers(7, 10), max_size=30), st.data())
def test_boundaries_do_not_depend_on_how_tokens_are_chunked(ids: list[int], data: st.DataObject) -> None:
    whole, chunked = StageTracker((THINK, CALL, ANSWER)), StageTracker((THINK, CALL, ANSWER))
    ends: list[StageEnd] = []
    rest = ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        ends += chunked.advance(rest[:size])
        rest = rest[size:]
    assert whole.advance(ids) == ends
    assert whole.finish() == chunked.finish()


def test_a_request_without_stages_is_refused() -> None:
    with pytest.raises(BadSloError):
        StageTracker(())
