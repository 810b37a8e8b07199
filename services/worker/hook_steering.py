"""What the hook and the scheduler say to each other about one step."""

from dataclasses import dataclass, field
from typing import NamedTuple

from services.core.batch import BatchPlan
from services.worker.hook_request import TrackedRequest

__all__ = ["Pool", "Progress", "Shortage", "Steering", "Verified"]


@dataclass(frozen=True, slots=True)
class Pool:
    """The engine's memory and seats. Sizes in KV blocks and requests."""

    free_blocks: int
    total_blocks: int
    block_size: int
    free_seats: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Steering:
    """Limits on one step. `limits` holds tokens by request key, for those that may not have all they want.

    `admit` are the waiting requests to let in, in order; None leaves the engine's queue as it is. `budget` limits the
    tokens of the whole step; None leaves the engine's own limit. `verify` is how many tokens a decoder may verify, by
    tier (1 beyond its end and for best effort); None leaves the drafts as they are.
    """

    limits: dict[str, int] = field(default_factory=dict)
    admit: tuple[str, ...] | None = None
    budget: int | None = None
    plan: BatchPlan | None = None
    verify: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Shortage:
    """What promised work of the next batch lacks, to be taken from best effort."""

    blocks: int
    seats: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A prefill that a scheduled step moved: `computed_tokens` of `total_tokens` once the step is done."""

    request: TrackedRequest
    scheduled_tokens: int
    computed_tokens: int
    total_tokens: int


class Verified(NamedTuple):
    """A decoder's part of a completed step: how many drafts it was allowed, and how many were accepted."""

    request: TrackedRequest
    allowed: int
    accepted: int
