"""Where prompts went: which replica probably has how much of a prompt in its prefix cache.

A memory of what was sent, not a report of what is cached: it orders replicas and never shortens a plan. A prompt is
remembered as chained hashes of chunks, at most as many per replica as its KV cache has room for, least recently used
out first, so that it forgets at about the pace of the replica.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["CHUNK_TOKENS", "PrefixMemory"]

CHUNK_TOKENS = 64


class PrefixMemory:
    """Remembers prompts by replica."""

    def __init__(self) -> None:
        self._chunks: dict[str, OrderedDict[int, None]] = {}

    def sent(self, replica_id: str, token_ids: Sequence[int], capacity_tokens: int) -> None:
        """A prompt went to a replica whose KV cache holds `capacity_tokens`."""
        known = self._chunks.setdefault(replica_id, OrderedDict())
        for chain in reversed(chunk_chain(token_ids)):  # heads last: they are what the most prompts share
            known[chain] = None
            known.move_to_end(chain)
        while len(known) > max(0, capacity_tokens // CHUNK_TOKENS):
            known.popitem(last=False)

    def cached_tokens(self, token_ids: Sequence[int], replica_ids: Iterable[str]) -> dict[str, int]:
        """Tokens of the prompt's head that each replica was sent before; replicas without any are left out."""
        candidates = [
            (replica_id, self._chunks[replica_id]) for replica_id in replica_ids if replica_id in self._chunks
        ]
        if not candidates:
            return {}
        chains = chunk_chain(token_ids)
        found = ((replica_id, _shared(chains, known)) for replica_id, known in candidates)
        return {replica_id: chunks * CHUNK_TOKENS for replica_id, chunks in found if chunks}

    def forget(self, replica_id: str) -> None:
        """The replica has gone, and its cache with it."""
        self._chunks.pop(replica_id, None)


def chunk_chain(token_ids: Sequence[int]) -> list[int]:
    """One hash per full chunk, each of everything up to its end."""
    raw = array("I", token_ids).tobytes()
    size = CHUNK_TOKENS * array("I").itemsize
    chains: list[int] = []
    chain = 0
    for start in range(0, len(raw) - size + 1, size):
        chain = hash((chain, raw[start : start + size]))
        chains.append(chain)
    return chains


def _shared(chains: Sequence[int], known: OrderedDict[int, None]) -> int:
    for count, chain in enumerate(chains):
        if chain not in known:
            return count
    return len(chains)
