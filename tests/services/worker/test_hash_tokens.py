"""Tokens that show any gap or repetition."""

import pytest

from services.worker.hash_tokens import HashTokens, digest_of


def test_a_token_depends_on_prompt_and_position_alone() -> None:
    tokens = HashTokens(4096, (0, 1, 2))
    assert tokens.token("d", 7) == HashTokens(4096, (0, 1, 2)).token("d", 7)
    assert tokens.continuation("d", 5, 4) == [tokens.token("d", position) for position in range(5, 9)]
    assert tokens.continuation("d", 5, 50) != tokens.continuation("e", 5, 50)


def test_special_tokens_never_appear() -> None:
    tokens = HashTokens(8, (0, 1, 2, 7))
    assert set(tokens.continuation("d", 0, 500)) == {3, 4, 5, 6}


def test_a_vocabulary_of_special_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no ordinary token"):
        HashTokens(2, (0, 1))


def test_prompts_have_different_digests() -> None:
    assert digest_of([1, 23]) != digest_of([12, 3])
