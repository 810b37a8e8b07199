"""Spans of one request on this replica: `queue`, `prefill`, and one `decode KIND` per stage.

All are recorded with hindsight, each as soon as both its ends are known. When the prefill began is known from the
scheduler's report, which may arrive after the first token.
"""

from services.common.clock import Clock
from services.common.telemetry import TraceContext, context_from, record_span
from services.worker.claims import Claimed
from services.worker.stage_times import StageTime

__all__ = ["StageSpans"]


class StageSpans:
    """Records the spans of one attempt; times are monotonic seconds."""

    def __init__(self, claimed: Claimed, replica_id: str, clock: Clock) -> None:
        request = claimed.request
        self._clock = clock
        self._parent = context_from(TraceContext(request.traceparent, request.tracestate))
        self._attributes: dict[str, str | bool | int] = {
            "slos_serve.request_id": request.request_id,
            "slos_serve.attempt": request.attempt,
            "slos_serve.replica": replica_id,
            "slos_serve.tier": request.tier,
            "slos_serve.promised": request.promised,
        }
        self._prompt_tokens = len(request.prompt_token_ids) + len(request.delivered_token_ids)
        # The entry's time is Redis's: never let a skewed clock turn the span around.
        self._queued_us = min(max(claimed.queued_us, request.arrival_us), clock.now_us())
        self._submitted_s = clock.now_s()
        self._scheduled_s: float | None = None
        self._first_token_s: float | None = None
        self._queue_done = False
        self._prefill_done = False

    def scheduled(self, at_s: float) -> None:
        """Its prefill began."""
        if self._scheduled_s is None:
            self._scheduled_s = at_s
            self._settle()

    def first_token(self, at_s: float) -> None:
        """This attempt's first token."""
        self._first_token_s = at_s
        self._settle()

    def stage(self, stage: StageTime, error: str | None = None) -> None:
        """A decode stage ended."""
        record_span(
            f"decode {stage.kind.value}",
            self._clock.to_unix_us(stage.begun_s),
            self._clock.to_unix_us(stage.ended_s),
            self._parent,
            self._attributes
            | {
                "slos_serve.output_tokens": stage.tokens,
                "slos_serve.tpot_ms": stage.tpot_s * 1000,
                "slos_serve.tpot_slo_ms": stage.tpot_slo_s * 1000,
            },
            error=error,
        )

    def finish(self, at_s: float, error: str | None = None) -> None:
        """Nothing more will be known: record what is still open, ending now."""
        if self._scheduled_s is None:
            self._scheduled_s = self._submitted_s if self._first_token_s is not None else at_s
        self._settle()
        if not self._prefill_done and at_s > self._scheduled_s:
            self._prefill(at_s, error)

    def _settle(self) -> None:
        if self._scheduled_s is None:
            return
        if not self._queue_done:
            self._queue_done = True
            end_us = max(self._queued_us, self._clock.to_unix_us(self._scheduled_s))
            record_span("queue", self._queued_us, end_us, self._parent, self._attributes)
        if self._first_token_s is not None and not self._prefill_done:
            self._prefill(self._first_token_s, None)

    def _prefill(self, end_s: float, error: str | None) -> None:
        self._prefill_done = True
        begun_s = min(end_s, self._scheduled_s if self._scheduled_s is not None else end_s)
        record_span(
            "prefill",
            self._clock.to_unix_us(begun_s),
            self._clock.to_unix_us(end_s),
            self._parent,
            self._attributes | {"slos_serve.prompt_tokens": self._prompt_tokens},
            error=error,
        )
