"""Stop strings are found across any boundaries, and nothing of them is ever shown."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.admission.stop import StopMatcher

letters = st.text("ab\n", max_size=24)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def streamed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        safe, hit = matcher.push(piece)
        shown += safe
        if hit:
            return shown, True
    return shown + matcher.flush(), False


def cut_at_the_first_complete(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(stops=stops, text=letters, cuts=st.lists(st.integers(0, 24), max_size=8))
def test_any_pieces_give_the_same_text(stops: list[str], text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert streamed(stops, pieces) == cut_at_the_first_complete(stops, text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("Hello.\n") == ("Hello.", False)
    assert matcher.push("Us") == ("", False)
    assert matcher.push("ual") == ("\nUsual", False)


def test_the_string_that_completes_first_wins() -> None:
    assert streamed(["abcd", "bc"], ["xabcd"]) == ("xa", True)
