"""Prompts have the length they were asked for, contain no control token and share no beginning."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prompts import PromptError, PromptMaker, load_prompt_maker

TOKENIZER_FILE = Path(__file__).parents[2] / "models" / "tiny" / "tokenizer.json"
CONTROL_TOKENS = ("<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<think>", "</think>", "<tool_call>", "</tool_call>")

LENGTHS = st.integers(1, 3000)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def maker() -> PromptMaker:
    return load_prompt_maker(TOKENIZER_FILE)


def _ids_without_begin(maker: PromptMaker, text: str) -> list[int]:
    ids: list[int] = maker.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@given(num_tokens=LENGTHS, seed=SEEDS)
def test_ids_have_exactly_the_length_asked_for(maker: PromptMaker, num_tokens: int, seed: int) -> None:
    assert len(maker.random_ids(num_tokens, seed)) == num_tokens
    assert len(maker.text_ids(num_tokens, seed)) == num_tokens


@given(seed=SEEDS)
def test_no_prompt_contains_a_control_token(maker: PromptMaker, seed: int) -> None:
    control_ids = {maker.tokenizer.token_to_id(token) for token in CONTROL_TOKENS}
    assert None not in control_ids
    assert control_ids.isdisjoint(maker.random_ids(2000, seed))
    assert control_ids.isdisjoint(maker.text_ids(2000, seed))


def test_random_ids_reach_the_whole_ordinary_vocabulary(maker: PromptMaker) -> None:
    drawn = set(maker.random_ids(100_000, seed=1))
    assert drawn == set(maker.ordinary_ids)
    assert len(drawn) == maker.tokenizer.get_vocab_size() - 10


@given(num_tokens=st.integers(20, 3000), seed=SEEDS)
def test_text_fills_its_length_but_for_less_than_a_word(maker: PromptMaker, num_tokens: int, seed: int) -> None:
    text = maker.text(num_tokens, seed)
    longest_word_tokens = 12
    assert num_tokens - longest_word_tokens < len(_ids_without_begin(maker, text)) <= num_tokens


def test_text_is_cut_between_words(maker: PromptMaker) -> None:
    words = set(" ".join(maker.sentences).split())
    assert words.issuperset(maker.text(300, seed=5).split(" ")[1:])


def test_the_same_seed_repeats_a_prompt_and_another_shares_no_first_block_with_it(maker: PromptMaker) -> None:
    assert maker.text(500, seed=1) == maker.text(500, seed=1)
    assert maker.random_ids(500, seed=1) == maker.random_ids(500, seed=1)
    block_tokens = 16
    beginnings = {tuple(maker.text_ids(block_tokens, seed)) for seed in range(500)}
    assert len(beginnings) == 500


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_an_empty_prompt_is_refused(maker: PromptMaker, num_tokens: int) -> None:
    for make in (maker.random_ids, maker.text_ids, maker.text):
        with pytest.raises(PromptError, match="at least one token"):
            make(num_tokens, 0)


def test_text_too_short_for_any_word_is_refused(maker: PromptMaker) -> None:
    with pytest.raises(PromptError, match="no word fits into 1 tokens"):
        maker.text(1, seed=0)


def test_a_missing_or_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no tokenizer file"):
        load_prompt_maker(tmp_path / "tokenizer.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{}", encoding="utf-8")
    with pytest.raises(PromptError, match="is not a tokenizer"):
        load_prompt_maker(broken)
