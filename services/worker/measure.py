"""What a worker measures, in one place: every method is one thing that happened."""

from protos import planner_pb2
from services.common.instruments import WorkerInstruments
from services.worker.engine_api import EngineEnd, EngineReport

__all__ = ["Measure"]


class Measure:
    """Writes to the worker's instruments; `replica_id` is on every measurement."""

    def __init__(self, instruments: WorkerInstruments, replica_id: str) -> None:
        self._instruments = instruments
        self._replica = {"slos_serve.replica": replica_id}
        self._preemptions = 0
        self._pauses = 0

    def report(self, report: EngineReport) -> None:
        """The scheduler's newest report."""
        self._instruments.running.set(report.running, self._replica)
        self._instruments.waiting.set(report.waiting, self._replica)
        self._instruments.free_blocks.set(report.free_blocks, self._replica)
        if report.preemptions > self._preemptions:
            self._instruments.preemptions.add(report.preemptions - self._preemptions, self._replica)
        self._preemptions = report.preemptions
        if report.pauses > self._pauses:
            self._instruments.pauses.add(report.pauses - self._pauses, self._replica)
        self._pauses = report.pauses
        if report.demoted:
            self._instruments.demotions.add(len(report.demoted), self._replica)

    def scheduled(self, tier: str, waited_s: float) -> None:
        """A prefill began `waited_s` after its entry was appended."""
        attributes = self._replica | {"slos_serve.tier": tier}
        self._instruments.queue_duration_s.record(max(0.0, waited_s), attributes)

    def finished(self, length: planner_pb2.FinishedLength, end: EngineEnd) -> None:
        """A request ended."""
        attributes = self._replica | {
            "slos_serve.application": length.application,
            "slos_serve.promised": length.promised,
            "slos_serve.end": end.value,
            "slos_serve.missed": length.missed,
        }
        self._instruments.ended.add(1, attributes)
