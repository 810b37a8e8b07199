"""Reports of the hook: built in the engine process, few and columnar, because a step waits for them."""

from collections.abc import Iterable

import numpy as np

from services.worker.hook import Hook
from services.worker.hook_config import model_terms
from services.worker.hook_pending import Decided
from services.worker.hook_request import TrackedRequest
from services.worker.hook_steering import Pool
from services.worker.link import DecidedEntry, HookEnd, ReportMessage, RequestEntry

__all__ = ["Reporter"]


class Reporter:
    """Sends a report when membership changed, and of mere progress at most every `interval_s`."""

    def __init__(self, link: HookEnd, hook: Hook, interval_s: float) -> None:
        self._link = link
        self._hook = hook
        self._interval_s = interval_s
        self._seq = 0
        self._sent_s = float("-inf")
        self._hook_s = 0.0
        self._hook_steps = 0

    def hook_took(self, seconds: float) -> None:
        """Time one step spent in the hook, for the mean that reports carry."""
        self._hook_s += seconds
        self._hook_steps += 1

    def flush(self, now_s: float, step: int, pool: Pool, waiting: Iterable[TrackedRequest], token_budget: int) -> None:
        """Report if something is due."""
        hook = self._hook
        if not (hook.changed or hook.gone or hook.hold.released) and now_s - self._sent_s < self._interval_s:
            return
        self._seq += 1
        self._sent_s = now_s
        changed = {**hook.changed, **hook.prefilling}
        unstarted = [request for request in (*waiting, *hook.prefilling.values()) if not request.on_tier]
        model = hook.timer.take_model()
        message = ReportMessage(
            self._seq,
            step,
            now_s,
            tuple(self._entry(request) for request in changed.values()),
            tuple(hook.gone),
            self._columns(),
            pool.free_blocks,
            pool.total_blocks,
            pool.block_size,
            pool.max_num_seqs,
            hook.timer.free_at_s,
            len(hook.table) + len(hook.prefilling),
            hook.waiting_count,
            len(unstarted) + int(np.count_nonzero(hook.table.ints("tier") < 0)),
            sum([request.total_tokens - request.computed_tokens for request in unstarted]),
            hook.preemptions,
            token_budget,
            hook.timer.take_observed(),
            1e6 * self._hook_s / max(1, self._hook_steps),
            model_terms(model) if model is not None else None,
            tuple(self._decided(decided) for decided in hook.demoted),
            tuple(self._decided(decided) for decided in hook.pending.take_decided()),
            hook.hold.take_released(),
            hook.speculation.take_acceptance() if hook.speculation.enabled else None,
            hook.pauses.count,
        )
        hook.changed.clear()
        hook.gone.clear()
        hook.demoted.clear()
        self._hook_s, self._hook_steps = 0.0, 0
        self._link.report(message)

    def _columns(self) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        table = self._hook.table
        read = table.columns()  # the next batch is planned with the same, unless something changes before it
        columns = (table.ints("number"), read.context_tokens, table.ints("outputs"), read.remaining_tokens)
        number, context, outputs, left = (column.tobytes() for column in columns)
        return number, context, outputs, left, read.next_deadline_s.tobytes()

    def _decided(self, decided: Decided) -> DecidedEntry:
        constraint = decided.constraint
        return DecidedEntry(
            decided.request.number,
            decided.admitted,
            decided.predicted_ttft_s,
            decided.predicted_tpot_s,
            constraint,
            self._hook.tier_name(constraint.tier) if constraint.tier >= 0 else "",
            decided.retry_after_s,
        )

    def _entry(self, request: TrackedRequest) -> RequestEntry:
        if request.decoding:
            self._hook.table.sync(request)
        terms = request.terms
        return RequestEntry(
            request.number,
            terms.request_id,
            terms.attempt,
            terms.application,
            request.tier_name,
            request.promised,
            request.started,
            request.total_tokens,
            request.computed_tokens,
            request.outputs,
            request.forecast_left,
            request.max_tokens - request.outputs,
            terms.ttft_deadline_s,
            request.due_s,
            request.tpot_s,
            request.scheduled_at_s,
            terms.accepted_at_s,
        )
