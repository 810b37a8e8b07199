"""When the client was sent which token, and what that means for each stage's SLO.

    stage 0:  ttft = t_first - arrival,  tpot = (t_last - t_first) / (n - 1)
    stage k:  tpot = (t_last - t_last of the stage before) / n

A stage is met when its TTFT and its mean TPOT are at most their SLOs. Times are Unix microseconds.
"""

from bisect import bisect_right
from dataclasses import dataclass

from protos import admission_pb2
from services.common.wire import stage_kind_to_wire
from services.core.slo import StageSlo
from services.core.stages import StageEnd

__all__ = ["StageClock"]


@dataclass(slots=True)
class _Seen:
    first_us: int = 0
    last_us: int = 0
    tokens: int = 0


class StageClock:
    """Delivery times of one request. A token counts when it is sent first: a replay changes nothing."""

    __slots__ = ("_arrival_us", "_ends", "_seen", "_stages", "delivered")

    def __init__(self, stages: tuple[StageSlo, ...], arrival_us: int) -> None:
        self._stages = stages
        self._arrival_us = arrival_us
        self._seen = [_Seen() for _ in stages]
        self._ends: list[int] = []
        self.delivered = 0

    def stage_ends(self, end: StageEnd) -> None:
        """A stage is known to end at a token that has not been sent yet."""
        self._ends.append(end.at_output_token)

    def tokens_sent(self, up_to: int, at_us: int) -> None:
        """All output tokens below index `up_to` have been sent by `at_us`."""
        while self.delivered < up_to:
            index = min(bisect_right(self._ends, self.delivered), len(self._stages) - 1)
            limit = self._ends[index] if index < len(self._ends) else up_to
            until = min(up_to, limit) if limit > self.delivered else up_to
            seen = self._seen[index]
            if seen.tokens == 0:
                seen.first_us = at_us
            seen.last_us = at_us
            seen.tokens += until - self.delivered
            self.delivered = until

    def report(self, index: int) -> admission_pb2.StageReport:
        """Promised against delivered for one stage, as far as it has come."""
        stage, seen = self._stages[index], self._seen[index]
        ttft_ms, tpot_ms = self._ttft_ms(index), self._tpot_ms(index)
        ttft_slo_ms = (stage.ttft_s or 0.0) * 1000
        tpot_slo_ms = stage.tpot_s * 1000
        met = seen.tokens > 0 and tpot_ms <= tpot_slo_ms and (stage.ttft_s is None or ttft_ms <= ttft_slo_ms)
        return admission_pb2.StageReport(
            kind=stage_kind_to_wire(stage.kind),
            ttft_slo_ms=ttft_slo_ms,
            ttft_ms=ttft_ms,
            tpot_slo_ms=tpot_slo_ms,
            tpot_ms=tpot_ms,
            output_tokens=seen.tokens,
            met=met,
        )

    def reports(self) -> list[admission_pb2.StageReport]:
        """The first stage and every later one that has tokens."""
        return [self.report(index) for index, seen in enumerate(self._seen) if index == 0 or seen.tokens]

    def _ttft_ms(self, index: int) -> float:
        seen = self._seen[index]
        return (seen.first_us - self._arrival_us) / 1000 if index == 0 and seen.tokens else 0.0

    def _tpot_ms(self, index: int) -> float:
        seen = self._seen[index]
        if index == 0:
            return (seen.last_us - seen.first_us) / 1000 / (seen.tokens - 1) if seen.tokens > 1 else 0.0
        return (seen.last_us - self._seen[index - 1].last_us) / 1000 / seen.tokens if seen.tokens else 0.0
