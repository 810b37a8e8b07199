"""Whether the engine has room for one more best-effort request, from the scheduler's last report.

What was submitted since that report is not in it yet and is counted on top. An engine that has had no best effort for
as long as best effort is to wait takes one request, room or not: there it is promoted or aged, which no queue can do.
"""

import time
from collections.abc import Callable

from services.core.best_effort import BEST_EFFORT_PATIENCE_S, may_pull
from services.core.perf_model import PerfModel
from services.worker.engine_api import EngineInfo, EngineReport

__all__ = ["BestEffortRoom"]

_BATCH_S = 0.100  # duration of the batch whose size counts while nothing has run yet
_MAX_BATCH_TOKENS = 8192


class BestEffortRoom:
    """Feeds the core's pull rule."""

    def __init__(
        self,
        info: EngineInfo,
        perf_model: PerfModel,
        patience_s: float = BEST_EFFORT_PATIENCE_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._info = info
        self._patience_s = patience_s
        self._now_s = now_s
        self._last_held_s = now_s()
        self._batch_tokens = min(_MAX_BATCH_TOKENS, max(1, perf_model.tokens_within(_BATCH_S, requests=1)))
        self._report: EngineReport | None = None
        self._unseen: dict[str, tuple[int, bool]] = {}  # prompt tokens, best effort

    def submitted(self, request_id: str, prompt_tokens: int, *, best_effort: bool) -> None:
        """A request went into the engine."""
        self._unseen[request_id] = (prompt_tokens, best_effort)
        if best_effort:
            self._last_held_s = self._now_s()

    def ended(self, request_id: str) -> None:
        """A request left the engine."""
        self._unseen.pop(request_id, None)

    def apply(self, report: EngineReport) -> None:
        """The scheduler's newest report."""
        self._report = report
        if report.best_effort:
            self._last_held_s = self._now_s()
        if report.token_budget > 0:
            self._batch_tokens = report.token_budget
        for progress in report.requests:
            self._unseen.pop(progress.request_id, None)
        for request_id in report.removed_ids:
            self._unseen.pop(request_id, None)

    def fits(self, prompt_tokens: int = 1) -> bool:
        """Whether a request with that prompt may be pulled. An idle engine takes any: it has nothing better to do."""
        report = self._report
        if not self._unseen and (report is None or report.running + report.waiting == 0):
            return True
        if self._now_s() - self._last_held_s > self._patience_s:
            return True
        unseen_tokens = sum(tokens for tokens, _ in self._unseen.values())
        free_blocks = self._info.total_blocks if report is None else report.free_blocks
        waiting_tokens = 0 if report is None else report.best_effort_prefill_tokens
        return may_pull(
            unprefilled_tokens=waiting_tokens + sum(tokens for tokens, free in self._unseen.values() if free),
            batch_tokens=self._batch_tokens,
            prompt_tokens=prompt_tokens,
            forecast_free_blocks=free_blocks - -(-unseen_tokens // self._info.block_size),
            block_size=self._info.block_size,
        )
