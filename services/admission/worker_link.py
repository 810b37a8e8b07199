"""The stream of tokens from one worker, kept up as long as its lease lives, and the calls about single requests."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc

from protos import router_pb2, worker_pb2, worker_pb2_grpc
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError, from_rpc_error
from services.common.kept import KeptTasks
from services.common.rpc import open_channel

__all__ = ["WorkerLink"]

_log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 1.0

_AT_LEAST = 16
_SHARE = 0.25
"""Of one step of a large engine, with its hundreds of chunks, so many are handed on in one turn of the event loop, or
as many as take this share of what the loop needed for its last turn: whoever calls meanwhile is not seen only after
all of them were sent, and while many call at once the tokens go on as well."""

OnChunks = Callable[[str, Sequence[worker_pb2.TokenChunk]], None]


class WorkerLink:
    """A subscription to one worker process.

    `on_chunks` gets the worker's name and the chunks of every message; `on_linked` is called when the subscription
    stands, again after every break, and `on_broken` when one that stood broke; `on_skew` gets the worker's clock minus
    ours, seconds.
    """

    def __init__(
        self,
        replica: router_pb2.Replica,
        admission_id: str,
        clock: Clock,
        tasks: KeptTasks,
        *,
        on_chunks: OnChunks,
        on_linked: Callable[[], None],
        on_broken: Callable[[], None],
        on_skew: Callable[[float], None],
    ) -> None:
        self.replica_id = replica.replica_id
        self.started_us = replica.started_us
        self._admission_id = admission_id
        self._clock = clock
        self._on_chunks = on_chunks
        self._on_linked = on_linked
        self._on_broken = on_broken
        self._on_skew = on_skew
        self.skew_s = 0.0
        self.up = False
        self._channel = open_channel(replica.address, traced=False)  # a span that lasts for days helps nobody
        self._stub = worker_pb2_grpc.WorkerStub(self._channel)
        self._tasks = tasks
        self._task = f"tokens from {replica.replica_id} since {replica.started_us}"
        tasks.keep(self._task, self._follow)

    async def close(self) -> None:
        """End the subscription."""
        await self._tasks.cancel(self._task)
        await self._channel.close()

    async def attach(self, request_id: str, from_token: int, grace_us: int = 0) -> worker_pb2.AttachResponse:
        """Have a request's output sent here, again from `from_token` on."""
        message = worker_pb2.AttachRequest(
            request_id=request_id, admission_id=self._admission_id, from_token=from_token, grace_us=grace_us
        )
        try:
            return await self._stub.Attach(message, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.WORKER_LOST) from None

    async def cancel(self, request_id: str, attempt: int, reason: str) -> bool:
        """Stop a request on the worker; False where it no longer ran."""
        message = worker_pb2.WorkerCancelRequest(request_id=request_id, attempt=attempt, reason=reason)
        try:
            return (await self._stub.Cancel(message, timeout=_CALL_TIMEOUT_S)).cancelled
        except grpc.RpcError as error:
            raise from_rpc_error(error, Reason.WORKER_LOST) from None

    async def _follow(self) -> None:
        self.up, retry_s = False, _FIRST_RETRY_S
        while True:
            try:
                await self._subscribe()
                _log.info("%s ended its token stream", self.replica_id)
                retry_s = _FIRST_RETRY_S
            except grpc.RpcError as raw:
                if self.up:
                    self._on_broken()
                    retry_s = _FIRST_RETRY_S
                error = from_rpc_error(raw, Reason.WORKER_LOST)
                level = logging.INFO if retry_s == _FIRST_RETRY_S else logging.DEBUG
                _log.log(level, "token stream from %s broke: %s", self.replica_id, error)
            except SloServeError as error:
                _log.warning("token stream from %s: %s", self.replica_id, error)
            self.up = False
            await asyncio.sleep(retry_s)
            retry_s = min(_LONGEST_RETRY_S, retry_s * 2)

    async def _subscribe(self) -> None:
        await self._channel.channel_ready()  # or the time to connect would look like skew
        asked_us = self._clock.now_us()
        call = self._stub.Subscribe(worker_pb2.SubscribeRequest(admission_id=self._admission_id))
        first, reading = True, asyncio.ensure_future(call.read())
        try:
            while isinstance(batch := await reading, worker_pb2.TokenBatch):
                reading = asyncio.ensure_future(call.read())  # takes turns of its own, so it goes on beside
                if first:
                    first = False
                    self.up = True
                    self._measure_skew(asked_us, batch.sent_at_us)
                    self._on_linked()
                await self._hand_on(batch)
        finally:
            reading.cancel()

    async def _hand_on(self, batch: worker_pb2.TokenBatch) -> None:
        """All chunks of a message, over as many turns of the event loop as leave the others their share."""
        chunks, done, took_s = batch.chunks, 0, 0.0
        while True:
            until_s = (began_s := self._clock.now_s()) + _SHARE * took_s
            while done < len(chunks):
                self._on_chunks(batch.replica_id, chunks[done : done + _AT_LEAST])
                done += _AT_LEAST
                if self._clock.now_s() >= until_s:
                    break
            if done >= len(chunks):
                return
            await asyncio.sleep(0)
            took_s = self._clock.now_s() - began_s

    def _measure_skew(self, asked_us: int, sent_at_us: int) -> None:
        heard_us = self._clock.now_us()
        if not asked_us <= sent_at_us <= heard_us:  # within the round trip there is none that could be told
            self.skew_s = (sent_at_us - (asked_us + heard_us) / 2) / 1e6
        else:
            self.skew_s = 0.0
        self._on_skew(self.skew_s)
