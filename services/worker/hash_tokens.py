"""The emulated engine's tokens: a hash of the prompt and the position, so that any gap or repetition shows.

Position counts from the start of the original prompt, whatever part of the output an earlier attempt delivered: a
request that continues elsewhere must produce exactly the ids it would have produced in one go.
"""

from collections.abc import Collection, Sequence
from hashlib import blake2b

__all__ = ["HashTokens", "digest_of"]


def digest_of(prompt_ids: Sequence[int]) -> str:
    """Digest of a prompt, for callers that have none at hand."""
    return blake2b(b",".join(str(token).encode() for token in prompt_ids), digest_size=16).hexdigest()


class HashTokens:
    """Maps (prompt digest, position) to an ordinary token id: never a special one, hence never an end of sequence."""

    def __init__(self, vocab_size: int, special_ids: Collection[int]) -> None:
        special = frozenset(special_ids)
        self._ordinary = tuple(token for token in range(vocab_size) if token not in special)
        if not self._ordinary:
            raise ValueError(f"no ordinary token among {vocab_size}")

    def token(self, digest: str, position: int) -> int:
        """The token at `position`, counted from the first token of the original prompt."""
        hashed = blake2b(f"{digest}:{position}".encode(), digest_size=8).digest()
        return self._ordinary[int.from_bytes(hashed, "little") % len(self._ordinary)]

    def coin(self, digest: str, position: int) -> float:
        """A number from 0 to 1 that belongs to a position, independent of its token."""
        hashed = blake2b(f"{digest}:{position}:coin".encode(), digest_size=8).digest()
        return int.from_bytes(hashed, "little") / 2**64

    def continuation(self, digest: str, prompt_tokens: int, count: int) -> list[int]:
        """The first `count` output tokens after a prompt of `prompt_tokens`."""
        return [self.token(digest, prompt_tokens + index) for index in range(count)]
