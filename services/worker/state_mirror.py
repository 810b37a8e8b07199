"""What the planner is told about this replica: numbered deltas, or everything, merged from the scheduler's reports.

The mirror holds the engine's whole state, so that a snapshot needs no answer of the engine. Reports that come faster
than messages leave are merged.
"""

import asyncio
import math
from collections import deque
from dataclasses import replace

from protos import planner_pb2
from services.common.clock import Clock
from services.common.wire import drafts_to_wire, perf_model_to_wire
from services.core.perf_model import PerfModel
from services.core.speculation import Drafts
from services.worker.engine_api import EngineInfo, EngineReport, RequestProgress

__all__ = ["StateMirror"]

_MAX_FINISHED = 4096  # lengths kept while no planner listens


class StateMirror:
    """The engine's state as of the last report, and what changed since the last message."""

    def __init__(self, replica_id: str, info: EngineInfo, perf_model: PerfModel, clock: Clock) -> None:
        self._replica_id = replica_id
        self._info = info
        self._clock = clock
        self.perf_model = perf_model
        self.changed = asyncio.Event()
        self._requests: dict[str, RequestProgress] = {}
        self._dirty: set[str] = set()
        self._removed: set[str] = set()
        self._finished: deque[planner_pb2.FinishedLength] = deque(maxlen=_MAX_FINISHED)
        self._latest: EngineReport | None = None
        self._model_changed = True
        self._drafts = Drafts(info.max_verify_tokens)
        self._drafts_changed = True
        self._seq = 0

    @property
    def latest(self) -> EngineReport | None:
        """The last report; None before the first."""
        return self._latest

    def apply(self, report: EngineReport) -> None:
        """Take the scheduler's next report."""
        if report.full:
            gone = self._requests.keys() - {progress.request_id for progress in report.requests}
        else:
            gone = self._requests.keys() & set(report.removed_ids)
        for request_id in gone:
            del self._requests[request_id]
            self._dirty.discard(request_id)
            self._removed.add(request_id)
        for progress in report.requests:
            self._requests[progress.request_id] = progress
            self._dirty.add(progress.request_id)
            self._removed.discard(progress.request_id)
        if report.perf_model is not None:
            self.perf_model = report.perf_model
            self._model_changed = True
        if report.acceptance is not None:
            self._drafts = replace(self._drafts, acceptance=report.acceptance)
            self._drafts_changed = True
        self._latest = report
        self.changed.set()

    def finished(self, length: planner_pb2.FinishedLength) -> None:
        """A request ended; its length goes with the next message."""
        self._finished.append(length)
        self.changed.set()

    def message(self, *, full: bool) -> planner_pb2.ReplicaState:
        """The next message: everything when `full`, else what changed since the last one."""
        self.changed.clear()
        self._seq += 1
        latest, info = self._latest, self._info
        now_s = self._clock.now_s()
        ids = self._requests.keys() if full else self._dirty
        state = planner_pb2.ReplicaState(
            replica_id=self._replica_id,
            seq=self._seq,
            full=full,
            observed_at_us=self._us(now_s if latest is None else latest.observed_at_s),
            requests=[self._to_wire(self._requests[request_id]) for request_id in ids],
            removed_ids=() if full else self._removed,
            free_blocks=info.total_blocks if latest is None else latest.free_blocks,
            total_blocks=info.total_blocks,
            block_size=info.block_size,
            max_num_seqs=info.max_num_seqs,
            max_model_len=info.max_model_len,
            max_batch_tokens=info.max_batch_tokens,
            batches_in_flight=2 if info.async_scheduling else 1,
            engine_free_at_us=self._us(now_s if latest is None else latest.engine_free_at_s),
            step=0 if latest is None else latest.step,
            finished=self._finished,
        )
        if full or self._model_changed:
            state.perf_model.CopyFrom(perf_model_to_wire(self.perf_model))
            self._model_changed = False
        if full or self._drafts_changed:
            state.drafts.CopyFrom(drafts_to_wire(self._drafts))
            self._drafts_changed = False
        self._dirty.clear()
        self._removed.clear()
        self._finished.clear()
        return state

    def _to_wire(self, progress: RequestProgress) -> planner_pb2.EngineRequest:
        return planner_pb2.EngineRequest(
            request_id=progress.request_id,
            attempt=progress.attempt,
            tier=progress.tier,
            promised=progress.promised,
            started=progress.started,
            prompt_tokens=progress.prompt_tokens,
            computed_tokens=progress.computed_tokens,
            output_tokens=progress.output_tokens,
            forecast_tokens=max(0, progress.forecast_tokens),
            ttft_deadline_us=self._us(progress.ttft_deadline_s),
            next_deadline_us=self._us(progress.next_deadline_s),
            tpot_ms=progress.tpot_s * 1000,
            application=progress.application,
            max_tokens=progress.max_tokens,
            accepted_at_us=self._us(progress.accepted_at_s),
        )

    def _us(self, monotonic_s: float) -> int:
        """Unix microseconds; 0 for a time that is not one, such as the deadline of a request without any."""
        return self._clock.to_unix_us(monotonic_s) if math.isfinite(monotonic_s) else 0
