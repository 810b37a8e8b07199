"""What a replica did, as running totals in its lease: time without work, and requests it declined."""

from services.common.clock import Clock
from services.worker.engine_api import EngineReport

__all__ = ["Activity"]


class Activity:
    """Counts from the scheduler's reports. Whoever wants a rate takes the difference of two looks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._idle_s = 0.0
        self._idle_since_s: float | None = clock.now_s()
        self.declined = 0

    def apply(self, report: EngineReport) -> None:
        """The scheduler's newest report."""
        now_s = self._clock.now_s()
        self.declined += sum(not decision.admitted for decision in report.decided)
        if report.running + report.waiting > 0:
            self._idle_s = self._total_s(now_s)
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s

    @property
    def idle_ms(self) -> int:
        """Milliseconds in which the engine had nothing to do."""
        return round(1000 * self._total_s(self._clock.now_s()))

    def _total_s(self, now_s: float) -> float:
        return self._idle_s + (0.0 if self._idle_since_s is None else now_s - self._idle_since_s)
