"""Takes requests from the queues and starts them.

A delivery is claimed, made a submission, and started; what cannot be started is ended at once, with the reason as its
only chunk. What was placed here is claimed side by side: one claim after the other, each a round trip, would make a
burst late. Best effort is taken one by one, and read only while there is room for it; an entry that turns out too long
for the room waits here, unclaimed, and no other is read meanwhile.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from protos import types_pb2
from services.common.clock import Clock
from services.common.errors import SloServeError
from services.common.keys import BEST_EFFORT_QUEUE, queue_key
from services.common.request_record import RequestState
from services.common.stream_reader import Delivery, StreamReader
from services.core.lengths import LengthForecaster
from services.worker.best_effort_room import BestEffortRoom
from services.worker.claims import Claimed, Claims
from services.worker.engine_api import EngineInfo, EngineReport, Submission
from services.worker.generations import Generations
from services.worker.outbox import Outbox
from services.worker.output import OutputEnd
from services.worker.submission import submission_of

__all__ = ["Intake"]

_log = logging.getLogger(__name__)

_MOST_CLAIMS = 64  # at a time; with so many under way no more is read


class Intake:
    """One task that reads, `run`; `drain` ends it without losing what was read."""

    def __init__(
        self,
        *,
        reader: StreamReader,
        claims: Claims,
        generations: Generations,
        outbox: Outbox,
        room: BestEffortRoom,
        forecaster: LengthForecaster,
        info: EngineInfo,
        clock: Clock,
        replica_id: str,
        tiers: Sequence[str],
        may_claim: Callable[[], bool],
        weight_of: Callable[[str], int],
    ) -> None:
        self._reader = reader
        self._claims = claims
        self._generations = generations
        self._outbox = outbox
        self._room = room
        self._forecaster = forecaster
        self._info = info
        self._clock = clock
        self._tier_streams = tuple(queue_key(replica_id, tier) for tier in tiers)
        self._may_claim = may_claim
        self._weight_of = weight_of  # of an application
        self._held: Delivery | None = None
        self._taking: dict[asyncio.Task[None], Delivery] = {}
        self._room_changed = asyncio.Event()
        self._draining = False
        self._idle_reads = 0
        self._drained = asyncio.Event()

    @property
    def entries(self) -> dict[str, list[str]]:
        """Entry ids of what runs or waits here, by stream."""
        entries = self._generations.entries
        here = [*self._taking.values(), *([self._held] if self._held is not None else [])]
        for delivery in here:
            entries.setdefault(delivery.stream, []).append(delivery.entry_id)
        return entries

    def apply(self, report: EngineReport) -> None:
        """The scheduler's newest report."""
        self._room.apply(report)
        self._room_changed.set()

    async def run(self) -> None:
        """Read until cancelled."""
        async with asyncio.TaskGroup() as group:
            waiting: asyncio.Task[None] | None = None
            try:
                async for delivery in self._reader.deliveries(self._streams):
                    self._idle_reads = 0
                    if delivery.stream != BEST_EFFORT_QUEUE:
                        await self._begin(group, delivery)
                    elif self._room.fits(_prompt_tokens(delivery)):
                        await self._take(delivery)
                    else:
                        self._held = delivery
                        waiting = group.create_task(self._take_when_it_fits(delivery))
            finally:
                if waiting is not None:
                    waiting.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Take what is promised here already, and nothing else; give a held entry back."""
        self._draining = True
        self._idle_reads = 0
        try:
            async with asyncio.timeout(timeout_s):
                await self._drained.wait()
                if self._taking:
                    await asyncio.wait(self._taking)
        except TimeoutError:
            _log.warning("the queues could not be read to their end within %.0f s", timeout_s)
        held, self._held = self._held, None
        if held is not None:
            await self._claims.hand_back(Claimed(held.request, held.stream, held.entry_id))

    def _streams(self) -> Sequence[str]:
        if self._draining:
            self._idle_reads += 1
            if self._idle_reads > 1:  # the read before found nothing
                self._drained.set()
                return ()
        if not self._may_claim():
            return ()
        if not self._draining and self._held is None and self._room.fits():
            return (*self._tier_streams, BEST_EFFORT_QUEUE)
        return self._tier_streams

    async def _begin(self, group: asyncio.TaskGroup, delivery: Delivery) -> None:
        """Take a delivery beside those before it."""
        while len(self._taking) >= _MOST_CLAIMS:
            await asyncio.wait(self._taking, return_when=asyncio.FIRST_COMPLETED)
        task = group.create_task(self._take(delivery))
        self._taking[task] = delivery
        task.add_done_callback(self._taking.pop)

    async def _take_when_it_fits(self, delivery: Delivery) -> None:
        while self._held is delivery and not (self._may_claim() and self._room.fits(_prompt_tokens(delivery))):
            self._room_changed.clear()
            await self._room_changed.wait()
        if self._held is delivery:
            await self._take(delivery)
            self._held = None

    async def _take(self, delivery: Delivery) -> None:
        request = delivery.request
        if self._generations.holds(request.request_id, request.attempt):
            return  # read again after a long silence; it is running
        self._generations.claiming(request.request_id)
        try:
            claimed = await self._claims.claim(delivery)
            if claimed is not None:
                await self._start(claimed)
        except SloServeError as error:  # the entry stays pending and is delivered again
            _log.warning("request %s is not claimed: %s", request.request_id, error)
        finally:
            self._generations.unclaimed(request.request_id)

    async def _start(self, claimed: Claimed) -> None:
        try:
            weight = self._weight_of(claimed.request.application)
            submission = submission_of(claimed.request, self._info, self._forecaster, self._clock, weight)
        except SloServeError as error:
            submission = OutputEnd(types_pb2.FINISH_REASON_ERROR, error.text)
        if isinstance(submission, Submission):
            prompt_tokens = len(submission.token_ids)
            self._room.submitted(
                claimed.request_id, prompt_tokens, best_effort=not (submission.promised or submission.pending)
            )
            await self._generations.start(claimed, submission)
        else:
            await self._end(claimed, submission)

    async def _end(self, claimed: Claimed, end: OutputEnd) -> None:
        """End a request that needs no engine, or may not have one."""
        request = claimed.request
        self._outbox.open_for(request)
        self._outbox.finish(claimed.request_id, claimed.attempt, end)
        failed = end.reason == types_pb2.FINISH_REASON_ERROR
        fields: dict[str, object] = {"output_tokens": len(request.delivered_token_ids)}
        if end.error:
            fields["error"] = end.error
        await self._claims.end(claimed, RequestState.FAILED if failed else RequestState.FINISHED, fields)


def _prompt_tokens(delivery: Delivery) -> int:
    return len(delivery.request.prompt_token_ids) + len(delivery.request.delivered_token_ids)
