"""Output as ids, texts, stage ends and cuts."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.admission.tokens import load_model_tokens
from services.admission.transcript import Cut, OutputRules, Transcript
from services.core.slo import StageKind, StageSlo
from tests.services.admission.conftest import MODEL
from tests.services.admission.world import ids_of

TOKENS = load_model_tokens(str(MODEL))
END_OF_THOUGHT = TOKENS.token_id("</think>")
TWO_STAGES = (
    StageSlo(StageKind.THINK, 0.5, None, 0.05, 6, END_OF_THOUGHT),
    StageSlo(StageKind.ANSWER, None, None, 0.1, 20),
)


def transcript(*, stops: tuple[str, ...] = (), min_tokens: int = 0, last_stage_limit: int | None = None) -> Transcript:
    rules = OutputRules(TWO_STAGES, (), TOKENS.silent_ids, stops, min_tokens, last_stage_limit)
    return Transcript(rules, TOKENS.decode)


@given(
    ids=st.lists(st.integers(0, TOKENS.vocabulary_size - 1), max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_chunks_do_not_matter(ids: list[int], cuts: list[int]) -> None:
    whole, pieces = transcript(stops=("a", "th")), transcript(stops=("a", "th"))
    ends, cut = whole.push(ids)
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    seen, last = [], None
    for start, end in itertools.pairwise(bounds):
        some, hit = pieces.push(ids[start:end])
        seen += some
        last = last or hit
    whole.close()
    pieces.close()
    assert (pieces.ids, pieces.texts, seen, last) == (whole.ids, whole.texts, ends, cut)


def test_a_stage_ends_with_its_end_token_or_its_limit() -> None:
    assert END_OF_THOUGHT is not None
    output = transcript()
    ends, _ = output.push([*ids_of(TOKENS, "hmm"), END_OF_THOUGHT, 50])
    assert [(end.stage_index, end.at_output_token) for end in ends] == [(0, len(ids_of(TOKENS, "hmm")) + 1)]
    output = transcript()
    ends, _ = output.push([50] * 8)
    assert [end.at_output_token for end in ends] == [6]


def test_ids_behind_a_stop_string_are_dropped() -> None:
    output = transcript(stops=("fox",))
    ids = ids_of(TOKENS, "the quick fox jumps")
    _, cut = output.push(ids)
    assert cut == Cut(by_stop_string=True)
    assert output.text(0, len(output.ids)) == "the quick "
    assert output.ids == ids[: len(output.ids)]
    assert "fox" in TOKENS.decode(output.ids) and "jump" not in TOKENS.decode(output.ids)
    assert output.push([50]) == ([], None)


def test_stop_strings_count_only_after_min_tokens() -> None:
    ids = ids_of(TOKENS, "stop stop stop stop")
    output = transcript(stops=("stop",), min_tokens=len(ids) - 1)
    output.push(ids)
    assert output.text(0, len(output.ids)).startswith("stop stop")


def test_the_last_stages_limit_cuts() -> None:
    assert END_OF_THOUGHT is not None
    output = transcript(last_stage_limit=2)
    _, cut = output.push([50, END_OF_THOUGHT, 51, 52, 53])
    assert cut == Cut(by_stop_string=False)
    assert output.ids == [50, END_OF_THOUGHT, 51, 52]
    end = output.last_stage_end()
    assert end is not None and (end.stage_index, end.at_output_token) == (1, 4)


def test_a_stage_without_a_token_never_ends() -> None:
    assert END_OF_THOUGHT is not None
    output = transcript()
    output.push([END_OF_THOUGHT])
    output.close()
    assert output.last_stage_end() is None
