"""Ids to text, one id at a time, as a pure function of the ids.

Theory of operation. A token's text depends on its neighbours: a character may span several ids, and some decoders drop
the space of the first word they see. So each id is decoded behind a short window of the ids before it, and what the
window had not shown yet is new text. U+FFFD at the end may be a character whose last bytes are still to come: it is
held back until the next id, or `flush`, decides. As every id is taken by itself, the chunks in which ids arrive cannot
change the text.
"""

from collections.abc import Callable, Iterable, Sequence

__all__ = ["Detokenizer"]

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"
_MAX_UNFINISHED = 3
"""UTF-8 spells a character in at most four bytes, so at most three can be waiting for the last."""
_WINDOW_IDS = _MAX_UNFINISHED + 3


class Detokenizer:
    """The text of one request's output.

    `decode` turns ids into text without dropping any; ids in `silent_ids` (control and end tokens) have no text.
    `prompt_tail` are the last ids of the prompt: the output continues them.
    """

    __slots__ = ("_decode", "_shown", "_silent_ids", "_window")

    def __init__(self, decode: Decode, silent_ids: frozenset[int], prompt_tail: Sequence[int] = ()) -> None:
        self._decode = decode
        self._silent_ids = silent_ids
        self._window: list[int] = []
        self._shown = 0
        self._slide([id_ for id_ in prompt_tail[-2 * _WINDOW_IDS :] if id_ not in silent_ids])

    def push(self, token_id: int) -> str:
        """The text that this id releases; empty where it must wait for the next."""
        if token_id in self._silent_ids:
            return ""
        ids = [*self._window, token_id]
        text = self._decode(ids)
        new = text[self._shown : _settled(text)]
        self._slide(ids)
        return new

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The text that these ids release together."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What is still held back, now that no more ids come."""
        text = self._decode(self._window) if self._window else ""
        held, self._shown = text[self._shown :], len(text)
        return held

    def _slide(self, ids: list[int]) -> None:
        self._window = ids[-_WINDOW_IDS:]
        self._shown = _settled(self._decode(self._window)) if self._window else 0


def _settled(text: str) -> int:
    """Length of the part of `text` that no further id can change."""
    end = len(text)
    while end and len(text) - end < _MAX_UNFINISHED and text[end - 1] == _UNFINISHED:
        end -= 1
    return end
