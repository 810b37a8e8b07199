"""What one engine step consists of: the result of batch formation."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BatchLimit", "BatchPlan", "Chunk"]


class BatchLimit(StrEnum):
    """What decided how long a batch may last."""

    CAP = "cap"
    SLACK = "slack"
    DEADLINE = "deadline"
    FLOOR = "floor"
    WORK = "work"
    TOKENS = "tokens"
    IDLE = "idle"


_WHY = {
    BatchLimit.CAP: "the duration cap",
    BatchLimit.SLACK: "the earliest decoder deadline",
    BatchLimit.DEADLINE: "the first prefill's deadline",
    BatchLimit.FLOOR: "the smallest batch that still moves prefill",
    BatchLimit.WORK: "the work at hand",
    BatchLimit.TOKENS: "the engine's limit on tokens per batch",
    BatchLimit.IDLE: "nothing to run",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """`tokens` prompt tokens of request `id`."""

    id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One engine step.

    `limit_s` is how long the batch may last, `duration_s` the predicted time of what was put in, `token_budget` the
    number of tokens put in. `cap_s` is the cap it was formed under, `limit` what bound it. Decoders on tiers are in
    `decode_ids` or, for this batch only, in `skipped_ids`; prefills in deadline order; best effort apart.
    `missing_blocks` is how many KV blocks work on tiers lacks in this batch: what preempting best effort must free.
    `verify_tokens` is how many tokens the decoders of each tier verify in it; 1 beyond its end.
    """

    limit_s: float
    duration_s: float
    token_budget: int
    decode_ids: Sequence[str]
    skipped_ids: Sequence[str]
    prefill: tuple[Chunk, ...]
    best_effort_decode_ids: tuple[str, ...]
    best_effort_prefill: tuple[Chunk, ...]
    cap_s: float
    limit: BatchLimit
    missing_blocks: int = 0
    verify_tokens: tuple[int, ...] = ()

    @property
    def why(self) -> str:
        """One sentence on what bound the batch."""
        return (
            f"{self.token_budget} tokens in {self.duration_s * 1e3:.1f} of {self.limit_s * 1e3:.1f} ms, "
            f"bound by {_WHY[self.limit]}"
        )
