"""Output on its way to the admission processes.

One *channel* per admission process, one *output* per request. An output holds every token id of its request once, in
compact form, and a cursor up to which its channel has sent them. Publishing appends ids and marks the output dirty; a
subscription drains what is dirty into one `TokenBatch`. The requests of one engine step are published in consecutive
turns of the event loop; a subscription lets turns pass until one publishes nothing, so that they leave as one message.
A slow admission process costs no memory per message: its next message simply has longer chunks.

Nothing depends on a subscription being there: output waits for one, and is kept for `retention_s` after its end, so
that `attach` can send it again, to the same admission process or to another.
"""

import asyncio
import contextlib
from array import array
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field

from protos import types_pb2, worker_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.worker.output import Output, OutputEnd

__all__ = ["RECONNECT_S", "Outbox"]

RECONNECT_S = 10.0  # an admission process whose subscription broke is back within it, or gone
_MAX_KEPT_TOKENS = 8_000_000  # of ended outputs; 32 MB
_MAX_TURNS = 16  # in which the requests of one engine step publish


@dataclass(slots=True, eq=False)
class _Channel:
    unsubscribed_at_s: float | None  # None while somebody listens
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    dirty: dict[str, Output] = field(default_factory=dict)
    published: int = 0  # counts every mark
    sending: bool = False  # a message is with gRPC, not yet taken
    generation: int = 0  # of the subscription that may read; an older one ends


async def _settle(channel: _Channel) -> None:
    """Wait for the rest of an engine step: until a turn of the event loop publishes nothing."""
    for _ in range(_MAX_TURNS):
        published = channel.published
        await asyncio.sleep(0)
        if channel.published == published:
            return


class Outbox:
    """All output of this worker, by request and by admission process."""

    def __init__(
        self, replica_id: str, clock: Clock, *, retention_s: float = 60.0, reconnect_s: float = RECONNECT_S
    ) -> None:
        self._replica_id = replica_id
        self._clock = clock
        self._retention_s = retention_s
        self._reconnect_s = reconnect_s
        self._outputs: dict[str, Output] = {}
        self._channels: dict[str, _Channel] = {}
        self._closed = False
        self._sent = asyncio.Event()  # a subscription has got rid of something, or is gone

    def open(
        self,
        request_id: str,
        attempt: int,
        admission_id: str,
        delivered_ids: Iterable[int] = (),
        *,
        grace_s: float = 0.0,
    ) -> None:
        """Begin the output of an attempt; a former attempt's output is forgotten.

        `grace_s`: how long it may run on without a subscription, beyond the time to come back from a broken one.
        """
        self._forget(request_id)
        ids = array("I", delivered_ids)
        now_s = self._clock.now_s()
        grace_s = max(self._reconnect_s, grace_s)
        self._outputs[request_id] = Output(request_id, attempt, admission_id, ids, len(ids), grace_s, now_s)
        self._channel(admission_id)

    def open_for(self, request: types_pb2.QueuedRequest) -> None:
        """Begin the output of a request's attempt, as its entry says."""
        self.open(
            request.request_id,
            request.attempt,
            request.admission_id,
            request.delivered_token_ids,
            grace_s=request.resume_grace_us / 1e6,
        )

    def publish(self, request_id: str, attempt: int, token_ids: Iterable[int], *, emitted_us: int) -> None:
        """Append new tokens. Ignored where the attempt has been superseded."""
        output = self._current(request_id, attempt)
        if output is not None:
            output.ids.extend(token_ids)
            output.emitted_us = emitted_us
            self._mark(output)

    def scheduled(self, request_id: str, attempt: int, *, scheduled_us: int) -> None:
        """When its prefill began; travels with the next chunk and causes none."""
        output = self._current(request_id, attempt)
        if output is not None:
            output.scheduled_us = scheduled_us

    def verdict(self, request_id: str, attempt: int, verdict: types_pb2.Verdict) -> None:
        """The promise changed on this replica."""
        output = self._current(request_id, attempt)
        if output is not None and output.end is None:
            output.verdict, output.verdict_sent = verdict, False
            self._mark(output)

    def finish(self, request_id: str, attempt: int, end: OutputEnd) -> None:
        """The last chunk: nothing follows. A second end is ignored."""
        output = self._current(request_id, attempt)
        if output is not None and output.end is None:
            output.end = end
            output.ended_at_s = self._clock.now_s()
            self._mark(output)

    def discard(self, request_id: str, attempt: int) -> None:
        """Forget an output without an end: the request goes on elsewhere."""
        if self._current(request_id, attempt) is not None:
            self._forget(request_id)

    def attach(self, request_id: str, admission_id: str, from_token: int, grace_s: float) -> worker_pb2.AttachResponse:
        """Send a request's output to `admission_id` from now on, beginning again at `from_token`.

        `grace_s` extends how long the request may run on without a subscription. Raises RESUME_OUT_OF_RANGE where the
        request has not produced that many tokens.
        """
        output = self._outputs.get(request_id)
        if output is None:
            return worker_pb2.AttachResponse(found=False)
        if from_token > len(output.ids):
            raise SloServeError(
                Reason.RESUME_OUT_OF_RANGE,
                f"from_token is {from_token}, request {request_id} has {len(output.ids)} output tokens",
            )
        self._channel(output.admission_id).dirty.pop(request_id, None)
        output.admission_id = admission_id
        output.cursor, output.verdict_sent = from_token, False
        output.orphan_grace_s = max(output.orphan_grace_s, grace_s)
        output.attached_at_s = self._clock.now_s()
        self._mark(output)
        return worker_pb2.AttachResponse(
            found=True, attempt=output.attempt, output_tokens=len(output.ids), finished=output.end is not None
        )

    async def subscribe(self, admission_id: str) -> AsyncGenerator[worker_pb2.TokenBatch, None]:
        """The messages of one subscription, the first without chunks. A newer subscription of the same id ends it."""
        channel = self._channel(admission_id)
        channel.generation += 1
        mine, seq = channel.generation, 1
        channel.unsubscribed_at_s = None
        channel.wake.set()  # an older subscription notices that it is over
        try:
            yield self._batch(seq, [])
            while channel.dirty or not self._closed:
                await channel.wake.wait()
                await _settle(channel)
                if channel.generation != mine:
                    return
                if not self._closed:
                    channel.wake.clear()
                if channel.dirty:
                    dirty, channel.dirty = channel.dirty, {}
                    seq += 1
                    channel.sending = True
                    yield self._batch(seq, [output.chunk() for output in dirty.values()])
                    channel.sending = False
                    self._sent.set()
        finally:
            channel.sending = False
            self._sent.set()
            if channel.generation == mine:
                channel.unsubscribed_at_s = self._clock.now_s()

    def close(self) -> None:
        """End every subscription once it has sent what there is."""
        self._closed = True
        for channel in self._channels.values():
            channel.wake.set()

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything there is has been handed to those who listen."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.undelivered:
                    self._sent.clear()
                    await self._sent.wait()

    @property
    def undelivered(self) -> bool:
        """True while a subscribed admission process has not been handed everything."""
        listening = (channel for channel in self._channels.values() if channel.unsubscribed_at_s is None)
        return any(channel.dirty or channel.sending for channel in listening)

    def sweep(self) -> list[str]:
        """Forget what nobody will collect, and name the running requests nobody listens to any more."""
        now_s = self._clock.now_s()
        ended = [output for output in self._outputs.values() if output.end is not None]
        kept = sum(len(output.ids) for output in ended)
        for output in sorted(ended, key=lambda o: (not o.delivered, o.ended_at_s)):
            if now_s - output.ended_at_s < self._retention_s and kept <= _MAX_KEPT_TOKENS:
                continue
            kept -= len(output.ids)
            self._forget(output.request_id)
        in_use = {output.admission_id for output in self._outputs.values()}
        for admission_id, channel in list(self._channels.items()):
            silent_s = 0.0 if channel.unsubscribed_at_s is None else now_s - channel.unsubscribed_at_s
            if admission_id not in in_use and silent_s > self._retention_s:
                del self._channels[admission_id]
        return [output.request_id for output in self._outputs.values() if self._orphaned(output, now_s)]

    def _orphaned(self, output: Output, now_s: float) -> bool:
        since_s = self._channel(output.admission_id).unsubscribed_at_s
        if output.end is not None or since_s is None:
            return False
        return now_s - max(since_s, output.attached_at_s) > output.orphan_grace_s

    def _batch(self, seq: int, chunks: list[worker_pb2.TokenChunk]) -> worker_pb2.TokenBatch:
        return worker_pb2.TokenBatch(
            replica_id=self._replica_id, seq=seq, sent_at_us=self._clock.now_us(), chunks=chunks
        )

    def _channel(self, admission_id: str) -> _Channel:
        channel = self._channels.get(admission_id)
        if channel is None:
            channel = self._channels[admission_id] = _Channel(self._clock.now_s())
        return channel

    def _current(self, request_id: str, attempt: int) -> Output | None:
        output = self._outputs.get(request_id)
        return output if output is not None and output.attempt == attempt else None

    def _mark(self, output: Output) -> None:
        channel = self._channel(output.admission_id)
        channel.dirty[output.request_id] = output
        channel.published += 1
        channel.wake.set()

    def _forget(self, request_id: str) -> None:
        output = self._outputs.pop(request_id, None)
        if output is not None:
            self._channel(output.admission_id).dirty.pop(request_id, None)
