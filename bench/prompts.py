"""Prompts of a given length: random token ids, or readable text.

No two prompts with different seeds share a beginning, so an engine's prefix cache cannot answer one with the other
and a measured prefill is a real one.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from tokenizers import Tokenizer

__all__ = ["PROMPT_TEXT", "PromptError", "PromptMaker", "load_prompt_maker"]

PROMPT_TEXT: Final = Path(__file__).parent / "prompt_text.txt"
"""A short text written for this project; its sentences are the material of text prompts."""


class PromptError(ValueError):
    """A prompt of this length cannot be made."""


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Makes prompts for one tokenizer.

    `ordinary_ids` are the ids a text can contain: control tokens (begin, end, roles, stages) are left out, because
    they would change what the model does. `sentences` is the material for readable prompts.
    """

    tokenizer: Tokenizer
    ordinary_ids: tuple[int, ...]
    sentences: tuple[str, ...]

    def random_ids(self, num_tokens: int, seed: int) -> list[int]:
        """Exactly `num_tokens` ordinary ids, drawn evenly; meaningless, and as costly to prefill as any text."""
        _check_length(num_tokens)
        return Random(seed).choices(self.ordinary_ids, k=num_tokens)

    def text_ids(self, num_tokens: int, seed: int) -> list[int]:
        """Exactly `num_tokens` ids of readable text; the last word may be cut."""
        return self._encode(self._long_text(num_tokens, seed))[:num_tokens]

    def text(self, num_tokens: int, seed: int) -> str:
        """Readable text of at most `num_tokens` ids, begin-of-text token not counted, cut at the end of a word.

        Falls short by less than one word. Raises PromptError if not even the first word fits.
        """
        words = self._long_text(num_tokens, seed).split(" ")
        fitting, too_many = 0, len(words) + 1
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if len(self._encode(" ".join(words[:middle]))) <= num_tokens:
                fitting = middle
            else:
                too_many = middle
        if fitting == 0:
            raise PromptError(f"no word fits into {num_tokens} tokens")
        return " ".join(words[:fitting])

    def _long_text(self, num_tokens: int, seed: int) -> str:
        """Sentences in random order, at least `num_tokens` ids of them, behind a word of this seed's own."""
        _check_length(num_tokens)
        random = Random(seed)
        parts = [f"{random.getrandbits(32):08x}:"]
        count = 0
        while count < num_tokens:
            sentences = random.sample(self.sentences, len(self.sentences))
            parts.extend(sentences)
            # Encoding a whole round at once keeps long prompts cheap.
            count += len(self._encode(" ".join(sentences)))
        return " ".join(parts)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def load_prompt_maker(tokenizer_file: Path, text_file: Path = PROMPT_TEXT) -> PromptMaker:
    """A maker for a model's `tokenizer.json`. Raises PromptError if the file is missing or not a tokenizer."""
    if not tokenizer_file.is_file():
        raise PromptError(f"no tokenizer file {tokenizer_file}")
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise PromptError(f"{tokenizer_file} is not a tokenizer: {error}") from error
    added = tokenizer.get_added_tokens_decoder()
    ordinary_ids = tuple(token for token in sorted(tokenizer.get_vocab().values()) if token not in added)
    sentences = re.split(r"(?<=[.?!])\s+", text_file.read_text(encoding="utf-8").strip())
    return PromptMaker(tokenizer, ordinary_ids, tuple(sentences))


def _check_length(num_tokens: int) -> None:
    if num_tokens < 1:
        raise PromptError(f"a prompt has at least one token, got {num_tokens}")
