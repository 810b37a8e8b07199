"""KV blocks and seats as the hook counts them before a step: what promised work needs, and who may start."""

from collections.abc import Collection, Sequence
from operator import attrgetter

from services.worker.decoder_table import DecoderTable
from services.worker.hook_request import TrackedRequest
from services.worker.hook_steering import Pool

__all__ = ["admissible", "blocks_to_finish", "crowded", "new_blocks"]


def blocks_to_finish(request: TrackedRequest, pool: Pool) -> int:
    """Blocks a prefill still needs. One that waits has none yet: of what the prefix cache would give it, only blocks
    that running requests hold are not taken from the free ones."""
    total = -(-request.total_tokens // pool.block_size)
    return total + (-request.computed_tokens // pool.block_size if request.started else -request.shared_blocks)


def new_blocks(table: DecoderTable, pool: Pool, verify: int = 1, *, promised_only: bool = False) -> int:
    """Blocks that decoding requests need for their next `verify` tokens, at most."""
    context = table.ints("context")
    new = -(-(context + verify) // pool.block_size) + (-context // pool.block_size)
    return int(new[table.ints("tier") >= 0].sum() if promised_only else new.sum())


def crowded(
    table: DecoderTable, started: Collection[TrackedRequest], waiting: Sequence[TrackedRequest], pool: Pool
) -> bool:
    """Whether all promised work together could lack blocks or seats."""
    tiered = [request for request in (*started, *waiting) if request.on_tier]
    blocks = len(table) + sum(blocks_to_finish(request, pool) + 1 for request in tiered)
    return blocks > pool.free_blocks or sum(not request.started for request in tiered) > pool.free_seats


def admissible(
    table: DecoderTable,
    started: Collection[TrackedRequest],
    waiting: Sequence[TrackedRequest],
    pool: Pool,
    verify: int = 1,
) -> list[TrackedRequest]:
    """The waiting requests whose whole prompts find KV blocks now: the engine starts no others.

    Promises first, by deadline; what started best effort still needs comes after them. The first that does not fit
    keeps what is free from everything behind it, or small prompts would starve it.
    """
    if not waiting:
        return []
    free = pool.free_blocks - new_blocks(table, pool, verify)
    free -= sum(blocks_to_finish(request, pool) for request in started if request.on_tier)
    best_effort = sum(blocks_to_finish(request, pool) for request in started if not request.on_tier)
    fitting: list[TrackedRequest] = []
    on_tier = sorted((request for request in waiting if request.on_tier), key=attrgetter("due_s"))
    for request in (*on_tier, *(request for request in waiting if not request.on_tier)):
        free -= blocks_to_finish(request, pool)
        if free < (0 if request.on_tier else best_effort):
            break
        fitting.append(request)
    return fitting
