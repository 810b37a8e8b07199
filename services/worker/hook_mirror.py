"""The worker's mirror of the engine: turns the hook's columnar reports into `EngineReport`s, and can say it all."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from services.core.perf_model import BatchShape
from services.worker.engine_api import EngineReport, RequestDecision, RequestProgress
from services.worker.hook_config import model_of
from services.worker.link import DecidedEntry, ReportMessage, RequestEntry

__all__ = ["HookMirror"]


class HookMirror:
    """Every request the engine holds, as of the last report."""

    def __init__(self) -> None:
        self._requests: dict[int, RequestProgress] = {}
        self._last: EngineReport | None = None
        self.total_blocks = 0
        self.block_size = 0
        self.max_num_seqs = 0
        self.hook_us = 0.0

    def apply(self, message: ReportMessage) -> EngineReport:
        """Take in a report; what it says, request by request."""
        self.total_blocks, self.block_size = message.total_blocks, message.block_size
        self.max_num_seqs, self.hook_us = message.max_num_seqs, message.hook_us
        changed: dict[int, RequestProgress] = {}
        for entry in message.entries:
            changed[entry.number] = self._requests[entry.number] = _progress(entry)
        for number, context, outputs, left, due_s in _rows(message):
            request = self._requests.get(number)
            if request is None:
                continue
            changed[number] = self._requests[number] = replace(
                request,
                computed_tokens=context,
                output_tokens=outputs,
                forecast_tokens=left,
                next_deadline_s=due_s,
            )
        decided, demoted = self._decisions(message.decided), self._decisions(message.demoted)
        released = [self._requests[number].request_id for number in message.released if number in self._requests]
        removed = [self._requests.pop(number) for number in message.removed if number in self._requests]
        report = EngineReport(
            step=message.step,
            observed_at_s=message.observed_at_s,
            full=False,
            requests=tuple(changed.values()),
            removed_ids=tuple(request.request_id for request in removed),
            free_blocks=message.free_blocks,
            engine_free_at_s=message.engine_free_at_s,
            running=message.running,
            waiting=message.waiting,
            best_effort=message.best_effort,
            best_effort_prefill_tokens=message.best_effort_prefill_tokens,
            preemptions=message.preemptions,
            token_budget=message.token_budget,
            batches=tuple((BatchShape(*row[:5]), row[5]) for row in message.batches),
            perf_model=model_of(message.model) if message.model is not None else None,
            demoted=demoted,
            decided=decided,
            released_ids=tuple(released),
            pauses=message.pauses,
            acceptance=message.acceptance,
        )
        self._last = report
        return report

    def snapshot(self) -> EngineReport | None:
        """A full report of what is known now; None before the first report."""
        if self._last is None:
            return None
        return replace(
            self._last,
            full=True,
            requests=tuple(self._requests.values()),
            removed_ids=(),
            batches=(),
            perf_model=None,
            acceptance=None,
            demoted=(),
            decided=(),
            released_ids=(),
        )

    def _decisions(self, entries: Iterable[DecidedEntry]) -> tuple[RequestDecision, ...]:
        known = [(self._requests.get(entry.number), entry) for entry in entries]
        return tuple(_decision(request, entry) for request, entry in known if request is not None)


def _rows(message: ReportMessage) -> list[tuple[int, int, int, int, float]]:
    number, context, outputs, left, due_s = message.decoding
    columns = [np.frombuffer(column, np.int64).tolist() for column in (number, context, outputs, left)]
    return list(zip(*columns, np.frombuffer(due_s, np.float64).tolist(), strict=True))


def _decision(request: RequestProgress, entry: DecidedEntry) -> RequestDecision:
    return RequestDecision(
        request.request_id,
        request.attempt,
        entry.admitted,
        entry.predicted_ttft_s,
        entry.predicted_tpot_s,
        entry.constraint,
        entry.tier,
        entry.retry_after_s,
    )


def _progress(entry: RequestEntry) -> RequestProgress:
    return RequestProgress(
        request_id=entry.request_id,
        attempt=entry.attempt,
        application=entry.application,
        tier=entry.tier,
        promised=entry.promised,
        started=entry.started,
        prompt_tokens=entry.prompt_tokens,
        computed_tokens=entry.computed_tokens,
        output_tokens=entry.output_tokens,
        forecast_tokens=entry.forecast_tokens,
        max_tokens=entry.max_tokens,
        ttft_deadline_s=entry.ttft_deadline_s,
        next_deadline_s=entry.next_deadline_s,
        tpot_s=entry.tpot_s,
        scheduled_at_s=entry.scheduled_at_s,
        accepted_at_s=entry.accepted_at_s,
    )
