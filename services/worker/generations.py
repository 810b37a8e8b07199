"""The requests this worker holds: every running attempt, by request id."""

import asyncio
import logging
from collections.abc import Callable

from services.common.errors import SloServeError
from services.worker.claims import Claimed
from services.worker.engine_api import EngineReport, Submission
from services.worker.generation import Generation, GenerationParts

__all__ = ["Generations"]

_log = logging.getLogger(__name__)


class Generations:
    """Starts attempts and tells them what happens to them. At most one attempt of a request runs here."""

    def __init__(self, parts: GenerationParts, on_left: Callable[[str], None]) -> None:
        """`on_left` hears the id of every request that has left the engine, however it ended."""
        self._parts = parts
        self._on_left = on_left
        self._running: dict[str, Generation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._claiming: dict[str, str | None] = {}  # the reason where it was cancelled meanwhile

    def __len__(self) -> int:
        return len(self._running)

    @property
    def entries(self) -> dict[str, list[str]]:
        """Entry ids of what runs, by stream."""
        found: dict[str, list[str]] = {}
        for generation in self._running.values():
            found.setdefault(generation.claimed.stream, []).append(generation.claimed.entry_id)
        return found

    def get(self, request_id: str) -> Generation | None:
        """The running attempt of a request."""
        return self._running.get(request_id)

    def holds(self, request_id: str, attempt: int) -> bool:
        """True where that attempt, or a later one, is running here."""
        generation = self._running.get(request_id)
        return generation is not None and generation.claimed.attempt >= attempt

    def claiming(self, request_id: str) -> None:
        """A claim is under way: a cancel that comes now is remembered until `start` or `unclaimed`."""
        self._claiming.setdefault(request_id, None)

    def unclaimed(self, request_id: str) -> None:
        """The claim came to nothing."""
        self._claiming.pop(request_id, None)

    async def start(self, claimed: Claimed, submission: Submission) -> None:
        """Run an attempt. An older attempt that still runs here is abandoned first."""
        request_id = claimed.request_id
        await self._displace(request_id)
        generation = Generation(claimed, submission, self._parts)
        self._running[request_id] = generation
        reason = self._claiming.pop(request_id, None)
        if reason is not None:
            await generation.cancel(reason)
        task = asyncio.create_task(generation.run(), name=f"generation {request_id}")
        self._tasks[request_id] = task
        task.add_done_callback(lambda done: self._ended(request_id, generation, done))

    async def cancel(self, request_id: str, attempt: int, reason: str) -> bool:
        """Cancel a request (attempt 0: whichever). False where it neither runs nor is being claimed here."""
        generation = self._running.get(request_id)
        if generation is None:
            if request_id not in self._claiming:
                return False
            self._claiming[request_id] = reason
            return True
        if attempt not in (0, generation.claimed.attempt):
            return False
        await generation.cancel(reason)
        return True

    def apply(self, report: EngineReport) -> None:
        """What the scheduler says about them."""
        for progress in report.requests:
            generation = self._running.get(progress.request_id)
            if generation is not None and progress.scheduled_at_s is not None:
                generation.scheduled(progress.scheduled_at_s)
        for decision in report.decided:
            if decision.request_id in self._running:
                self._running[decision.request_id].decided(decision)
        for decision in report.demoted:
            if decision.request_id in self._running:
                self._running[decision.request_id].demoted(decision)
        for request_id in report.released_ids:
            if request_id in self._running:
                self._running[request_id].released()

    async def verify(self) -> None:
        """Abandon every attempt that Redis no longer gives to this worker. Raises SloServeError while Redis is away."""
        for generation in list(self._running.values()):
            if not await self._parts.claims.still_ours(generation.claimed):
                _log.warning("request %s is another's now", generation.claimed.request_id)
                await generation.abandon()

    async def hand_back_unstarted(self) -> None:
        """Give requests without a promise whose prefill has not begun to other workers."""
        for generation in list(self._running.values()):
            if not generation.started and not generation.promised:
                await generation.hand_back()

    async def abandon_all(self) -> None:
        """Leave every request as it is, for another worker to take on."""
        running = list(self._running.values())
        for outcome in await asyncio.gather(*(one.abandon() for one in running), return_exceptions=True):
            if isinstance(outcome, BaseException):
                _log.warning("the engine does not abort: %r", outcome)

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait for what runs to end; False where something still runs after `timeout_s`."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=timeout_s)
        return not self._tasks

    async def close(self) -> None:
        """Drop whatever would not end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _displace(self, request_id: str) -> None:
        generation, task = self._running.get(request_id), self._tasks.get(request_id)
        if generation is not None and task is not None:
            await generation.abandon()
            await asyncio.wait([task])

    def _ended(self, request_id: str, generation: Generation, task: "asyncio.Task[None]") -> None:
        if self._running.get(request_id) is generation:
            del self._running[request_id]
            del self._tasks[request_id]
        self._on_left(request_id)
        if not task.cancelled() and (error := task.exception()) is not None:
            level = logging.WARNING if isinstance(error, SloServeError) else logging.ERROR
            _log.log(level, "request %s ended badly", request_id, exc_info=error)
