"""Text is a pure function of the ids, whatever the chunks they arrive in."""

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from services.admission.detokenize import Detokenizer
from services.admission.tokens import load_model_tokens
from tests.services.admission.conftest import MODEL

BYTE_LEVEL = load_model_tokens(str(MODEL))
NONE: frozenset[int] = frozenset()


def sentencepiece_like() -> Tokenizer:
    """Words begin with a marker that decodes to a space (the first one goes); the unknown is spelt in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


SENTENCEPIECE = sentencepiece_like()


def decode_sentencepiece(ids: Sequence[int]) -> str:
    text: str = SENTENCEPIECE.decode(ids, skip_special_tokens=False)
    return text


def in_chunks(detokenizer: Detokenizer, ids: Sequence[int], cuts: Sequence[int]) -> str:
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    parts = [detokenizer.push_all(ids[start:end]) for start, end in itertools.pairwise(bounds)]
    return "".join(parts) + detokenizer.flush()


def whole_part(ids: Sequence[int]) -> str:
    """A prompt's text up to the last point where no character was half spelt."""
    texts = [BYTE_LEVEL.decode(ids[:end]) for end in range(len(ids), -1, -1)]
    return next(text for text in texts if not text.endswith("\ufffd"))


arbitrary_ids = st.lists(st.integers(0, BYTE_LEVEL.vocabulary_size - 1), max_size=40)
cuts = st.lists(st.integers(0, 40), max_size=6)


@given(ids=arbitrary_ids, cuts=cuts, tail=st.lists(st.integers(0, BYTE_LEVEL.vocabulary_size - 1), max_size=6))
def test_any_chunks_of_any_ids_give_the_text_of_decoding_at_once(
    ids: list[int], cuts: list[int], tail: list[int]
) -> None:
    out = in_chunks(Detokenizer(BYTE_LEVEL.decode, NONE, tail), ids, cuts)
    assert whole_part(tail) + out == BYTE_LEVEL.decode([*tail, *ids])


@given(text=st.text(max_size=30), cuts=cuts)
@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (lambda text: BYTE_LEVEL.tokenizer.encode(text, add_special_tokens=False).ids, BYTE_LEVEL.decode),
        (lambda text: SENTENCEPIECE.encode(text).ids, decode_sentencepiece),
    ],
    ids=["byte level", "sentencepiece"],
)
def test_text_comes_back_as_it_was(
    encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str], text: str, cuts: list[int]
) -> None:
    ids = encode(text)
    assert in_chunks(Detokenizer(decode, NONE), ids, cuts) == decode(ids)


def test_the_prompts_tail_decides_about_a_leading_space() -> None:
    prompt, word = SENTENCEPIECE.encode("the quick").ids, SENTENCEPIECE.encode("fox").ids
    assert Detokenizer(decode_sentencepiece, NONE, prompt).push_all(word) == " fox"
    assert Detokenizer(decode_sentencepiece, NONE).push_all(word) == "fox"


def test_a_character_is_held_back_until_it_is_complete() -> None:
    ids = [BYTE_LEVEL.token_id(token) for token in "ðŁĳĭ"]  # the four bytes of a waving hand
    detokenizer = Detokenizer(BYTE_LEVEL.decode, NONE)
    texts = [detokenizer.push(id_) for id_ in ids if id_ is not None]
    assert texts == ["", "", "", "👋"]


def test_a_character_begun_in_the_prompt_is_finished_in_the_output() -> None:
    ids = [id_ for id_ in (BYTE_LEVEL.token_id(token) for token in "ðŁĳĭ") if id_ is not None]
    assert Detokenizer(BYTE_LEVEL.decode, NONE, ids[:2]).push_all(ids[2:]) == "👋"


def test_what_never_becomes_a_character_comes_out_at_the_end() -> None:
    first_byte = BYTE_LEVEL.token_id("ð")
    assert first_byte is not None
    detokenizer = Detokenizer(BYTE_LEVEL.decode, NONE)
    assert detokenizer.push(first_byte) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_control_tokens_have_no_text() -> None:
    ids = BYTE_LEVEL.encode("ends here") + list(BYTE_LEVEL.stop_token_ids)
    assert Detokenizer(BYTE_LEVEL.decode, BYTE_LEVEL.silent_ids).push_all(ids) == "ends here"
