"""Ids to text, one id at a time, as a pure function of the ids.

Theory of operation. A token's text depends on its neighbours: a character may span several ids, and some decoders drop
the space of the first word they see. So ids are decoded behind a context: the ids between the last two points where the
text was whole. Text is whole where it does not end in U+FFFD, which stands for a character whose last bytes are still
to come; until then ids are held back. As every id is taken by itself, the chunks in which ids arrive cannot change the
text.
"""

from collections.abc import Callable, Iterable, Sequence

__all__ = ["Detokenizer"]

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"
_MAX_HELD_IDS = 64
"""Ids that never become text are released after so many: by then they are no character but bytes at random."""
_TAIL_IDS = 8


class Detokenizer:
    """The text of one request's output.

    `decode` turns ids into text without dropping any; ids in `silent_ids` (control and end tokens) have no text.
    `prompt_tail` are the last ids of the prompt: the output continues them, even in the middle of a character.
    """

    __slots__ = ("_context", "_context_chars", "_decode", "_held", "_silent_ids")

    def __init__(self, decode: Decode, silent_ids: frozenset[int], prompt_tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._silent_ids = silent_ids
        self._context: list[int] = []
        self._context_chars = 0
        self._held: list[int] = []
        self.push_all(prompt_tail[-_TAIL_IDS:])

    def push(self, token_id: int) -> str:
        """The text that this id releases; empty where it must wait for the next."""
        if token_id in self._silent_ids:
            return ""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if text.endswith(_UNFINISHED) and len(self._held) < _MAX_HELD_IDS:
            return ""
        return self._release(text)

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The text that these ids release together."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What is still held back, now that no more ids come."""
        return self._release(self._decode(self._context + self._held)) if self._held else ""

    def _release(self, text: str) -> str:
        new = text[self._context_chars :]
        self._context, self._held = self._held, []
        self._context_chars = len(self._decode(self._context))
        return new
