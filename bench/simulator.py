"""Virtual time around vLLM's real scheduler.

Theory of operation. Events are arrivals and ends of batches, in order of time; the clock jumps from one to the next,
and nothing else passes time. At an arrival the front decides where the call goes. At every moment at which a replica
has room for a batch and work to do, the front may decide again, and the replica starts its next batch; the performance
model says when it ends. So an hour of traffic costs what its scheduling costs.
"""

import gc
import heapq
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from bench.scenario_jobs import Job
from bench.simulator_call import LiveCall
from bench.simulator_replica import Replica

__all__ = ["Clock", "Front", "Run", "Simulation"]

_GRACE_S = 20.0


class Clock:
    """Virtual monotonic time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def read(self) -> float:
        """Seconds now."""
        return self.now_s


class Front(Protocol):
    """What stands before the replicas: which call goes where, with or without a promise."""

    replicas: Sequence[Replica]

    def arrived(self, call: LiveCall, now_s: float) -> None:
        """A call has arrived: add it to a replica, keep it for later, or mark it refused."""

    def before_batch(self, replica: Replica, now_s: float) -> None:
        """The replica is about to start a batch."""

    def after_batch(self, replica: Replica, now_s: float) -> None:
        """The replica has formed a batch, or taken the output of one."""

    def may_have_work(self, replica: Replica) -> bool:
        """Whether `before_batch` may give the replica something to do."""

    def finished(self, call: LiveCall, now_s: float) -> None:
        """A call has its last token."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came out. `cut`: it ended early, with too many `missed` or too `late` (20 s after the last deadline)."""

    calls: tuple[LiveCall, ...]
    jobs: int
    steps: int
    end_s: float
    cut: str = ""


class Simulation:
    """One run of jobs through a front. `most_missed` jobs may miss their first token before the run is cut."""

    def __init__(self, clock: Clock, front: Front, jobs: Sequence[Job], most_missed: int | None = None) -> None:
        self._clock = clock
        self._front = front
        self._jobs = len(jobs)
        self._most_missed = len(jobs) if most_missed is None else most_missed
        self._order = itertools.count()
        self._events: list[tuple[float, int, LiveCall | Replica]] = []
        self._calls: list[LiveCall] = []
        self._due: list[tuple[float, int, LiveCall]] = []
        self._missed: set[int] = set()
        self._open = 0
        self._last_deadline_s = 0.0
        for job in jobs:
            self._send(job, 0, job.arrival_s)

    def run(self) -> Run:
        """Run until every call has ended or nothing more can happen, or the run is cut."""
        cut = ""
        with _without_collector():
            while self._open and self._events and not cut:
                self._advance()
                if len(self._missed) > self._most_missed:
                    cut = "missed"
                elif self._clock.now_s > self._last_deadline_s + _GRACE_S and not self._pending_arrivals:
                    cut = "late"
        steps = sum(replica.steps for replica in self._front.replicas)
        return Run(tuple(self._calls), self._jobs, steps, self._clock.now_s, cut)

    @property
    def _pending_arrivals(self) -> bool:
        return any(isinstance(event, LiveCall) for _, _, event in self._events)

    def _send(self, job: Job, index: int, at_s: float) -> None:
        call = LiveCall(f"{job.number}.{index}", job, index, at_s)
        self._open += 1
        heapq.heappush(self._events, (at_s, next(self._order), call))

    def _advance(self) -> None:
        """Take all events of the next moment, then start what batches can be started."""
        now_s = self._clock.now_s = self._events[0][0]
        while self._events and self._events[0][0] <= now_s:
            _, _, event = heapq.heappop(self._events)
            if isinstance(event, LiveCall):
                self._arrive(event, now_s)
            else:
                self._complete(event, now_s)
        self._count_missed(now_s)
        for replica in self._front.replicas:
            while replica.has_room and (replica.has_work or self._front.may_have_work(replica)):
                self._front.before_batch(replica, now_s)
                done_s = replica.step(now_s) if replica.has_work else None
                self._front.after_batch(replica, now_s)
                if done_s is None:
                    break
                heapq.heappush(self._events, (done_s, next(self._order), replica))

    def _arrive(self, call: LiveCall, now_s: float) -> None:
        self._calls.append(call)
        self._last_deadline_s = max(self._last_deadline_s, call.last_deadline_s)
        heapq.heappush(self._due, (call.deadline_s, next(self._order), call))
        self._front.arrived(call, now_s)
        if call.refused:
            self._open -= 1
            self._missed.add(call.job.number)

    def _complete(self, replica: Replica, now_s: float) -> None:
        produced = replica.complete(now_s)
        self._front.after_batch(replica, now_s)
        for call, tokens, finished in produced:
            call.token_s.extend([now_s] * tokens)
            if finished:
                call.finished = True
                self._open -= 1
                self._front.finished(call, now_s)
                if call.index + 1 < len(call.job.calls):
                    self._send(call.job, call.index + 1, now_s + call.job.calls[call.index + 1].gap_s)

    def _count_missed(self, now_s: float) -> None:
        """Calls whose first token is overdue."""
        while self._due and self._due[0][0] < now_s:
            _, _, call = heapq.heappop(self._due)
            if not call.token_s or call.token_s[0] > call.deadline_s:
                self._missed.add(call.job.number)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Collecting cycles costs a third of a run and finds nothing that a run leaves behind."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
