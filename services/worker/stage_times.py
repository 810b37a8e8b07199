"""When each stage of a request began and ended on this replica, and whether its SLO was met there."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.core.slo import StageKind, StageSlo
from services.core.stages import StageTracker

__all__ = ["StageTime", "StageTimes"]

_GRAIN_S = 1e-6  # of times on the wire: a difference below it is no miss


@dataclass(frozen=True, slots=True)
class StageTime:
    """One decode stage as it went, monotonic seconds: from its first token, or the last one of the stage before."""

    kind: StageKind
    begun_s: float
    ended_s: float
    tokens: int
    intervals: int  # between tokens, which the TPOT is the mean of
    tpot_slo_s: float

    @property
    def tpot_s(self) -> float:
        """Mean time per output token; 0 where there was only the first one."""
        return (self.ended_s - self.begun_s) / self.intervals if self.intervals else 0.0


class StageTimes:
    """Follows one attempt. Tokens of earlier attempts count, but their times are known only for the first token."""

    def __init__(self, stages: Sequence[StageSlo], delivered_ids: Iterable[int], first_token_s: float | None) -> None:
        self._stages = tuple(stages)
        self._tracker = StageTracker(stages)
        self._tracker.advance(delivered_ids)
        self.first_token_s = first_token_s
        self._last_token_s = first_token_s
        self._begun_s = first_token_s if self._tracker.stage_index == 0 else None
        # Tokens of the stage that end no measured interval: the one its time begins with, and unseen ones before it.
        self._uncounted = 1 if self._tracker.stage_index == 0 else 1 + self._tracker.stage_output_tokens
        self.done: list[StageTime] = []

    @property
    def output_tokens(self) -> int:
        """Output tokens over all attempts."""
        return self._tracker.output_tokens

    def advance(self, token_ids: Sequence[int], at_s: float) -> list[StageTime]:
        """Count tokens emitted at a time; returns the stages that ended with them."""
        if not token_ids:
            return []
        if self.first_token_s is None:
            self.first_token_s = at_s
        if self._begun_s is None:
            self._begun_s = at_s
        ended: list[StageTime] = []
        for token_id in token_ids:
            index, tokens = self._tracker.stage_index, self._tracker.stage_output_tokens + 1
            if self._tracker.advance((token_id,)):
                ended.append(self._stage_time(index, tokens, at_s))
                self._begun_s, self._uncounted = at_s, 0
        self._last_token_s = at_s
        self.done.extend(ended)
        return ended

    def finish(self) -> StageTime | None:
        """The request ended: so does its last stage, with its last token. None where that stage has no token."""
        tokens = self._tracker.stage_output_tokens
        if self._begun_s is None or self._last_token_s is None or not tokens:
            return None
        last = self._stage_time(self._tracker.stage_index, tokens, self._last_token_s)
        self.done.append(last)
        return last

    def missed(self, ttft_deadline_s: float) -> str:
        """What its SLOs missed, as the replica saw it: `ttft`, `tpot`, or nothing."""
        if self.first_token_s is None or self.first_token_s > ttft_deadline_s:
            return "ttft"
        return "tpot" if any(stage.tpot_s > stage.tpot_slo_s + _GRAIN_S for stage in self.done) else ""

    def _stage_time(self, index: int, tokens: int, at_s: float) -> StageTime:
        stage = self._stages[index]
        begun_s = at_s if self._begun_s is None else self._begun_s
        return StageTime(stage.kind, begun_s, at_s, tokens, max(0, tokens - self._uncounted), stage.tpot_s)
