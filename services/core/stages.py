"""Where one stage ends and the next begins, as a pure function of the output token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.core.errors import BadSloError
from services.core.slo import StageKind, StageSlo

__all__ = ["StageEnd", "StageTracker"]


@dataclass(frozen=True, slots=True)
class StageEnd:
    """A stage is over. `at_output_token` counts output tokens of the request up to and including its last one."""

    stage_index: int
    kind: StageKind
    at_output_token: int


class StageTracker:
    """Follows one request through its stages.

    A stage ends with its `end_token_id` (which belongs to it) or after its `max_tokens`, whichever comes first.
    The last stage ends with the request: call `finish()`. Every process that replays the same ids sees the same
    boundaries, whatever the chunks they arrive in.
    """

    __slots__ = ("_in_stage", "_index", "_stages", "_total")

    def __init__(self, stages: Sequence[StageSlo]) -> None:
        if not stages:
            raise BadSloError("a request has at least one stage")
        self._stages = tuple(stages)
        self._index = 0
        self._in_stage = 0
        self._total = 0

    @property
    def stage_index(self) -> int:
        """Index of the stage that the next token belongs to."""
        return self._index

    @property
    def current(self) -> StageSlo:
        """The stage that the next token belongs to."""
        return self._stages[self._index]

    @property
    def output_tokens(self) -> int:
        """Output tokens seen so far, over all stages."""
        return self._total

    @property
    def stage_output_tokens(self) -> int:
        """Output tokens seen so far in the current stage."""
        return self._in_stage

    def advance(self, token_ids: Iterable[int]) -> list[StageEnd]:
        """Count new output tokens and return the stages they ended, in order."""
        ends: list[StageEnd] = []
        last = len(self._stages) - 1
        for token_id in token_ids:
            self._total += 1
            self._in_stage += 1
            stage = self._stages[self._index]
            over = token_id == stage.end_token_id or self._in_stage >= stage.max_tokens
            if over and self._index < last:
                ends.append(self._end())
                self._index += 1
                self._in_stage = 0
        return ends

    def finish(self) -> StageEnd:
        """The request ended: so does the stage it was in."""
        return self._end()

    def _end(self) -> StageEnd:
        return StageEnd(self._index, self._stages[self._index].kind, self._total)
