"""The stream to this replica's planner: state out, directives in, again and again."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from protos import planner_pb2, planner_pb2_grpc
from services.common.rpc import open_channel
from services.worker.state_mirror import StateMirror

__all__ = ["Reporter"]

_log = logging.getLogger(__name__)

_MIN_INTERVAL_S = 0.020  # between two messages: a planner plans in milliseconds, an engine may step faster
_HEARTBEAT_S = 0.5
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 0.5


class Reporter:
    """Keeps one `Planner.Observe` open. Every new connection begins with a full snapshot."""

    def __init__(
        self,
        planner: str,
        mirror: StateMirror,
        on_directive: Callable[[planner_pb2.Directive], Awaitable[None]],
        *,
        min_interval_s: float = _MIN_INTERVAL_S,
    ) -> None:
        self._planner = planner
        self._mirror = mirror
        self._on_directive = on_directive
        self._min_interval_s = min_interval_s
        self._connection = 0
        self._snapshot_wanted = False
        self._linked = asyncio.Event()

    async def wait_linked(self, timeout_s: float) -> bool:
        """Return True once the planner took a first snapshot, False after `timeout_s`."""
        try:
            await asyncio.wait_for(self._linked.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Report until cancelled."""
        backoff_s, quiet = _FIRST_BACKOFF_S, False
        async with open_channel(self._planner, traced=False) as channel:
            stub = planner_pb2_grpc.PlannerStub(channel)
            while True:
                try:
                    async for directive in stub.Observe(self._states()):
                        backoff_s, quiet = _FIRST_BACKOFF_S, False
                        await self._obey(directive)
                    reason = "it closed the stream"
                except grpc.aio.AioRpcError as error:
                    reason = error.details() or error.code().name
                if not quiet:
                    _log.warning("no planner at %s, trying again: %s", self._planner, reason)
                quiet = True
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
                backoff_s = min(_LAST_BACKOFF_S, 2 * backoff_s)

    async def _states(self) -> AsyncIterator[planner_pb2.ReplicaState]:
        self._connection += 1
        mine = self._connection
        self._snapshot_wanted = True
        while mine == self._connection:  # a broken call may ask on for a while: it must not take what is the next one's
            full, self._snapshot_wanted = self._snapshot_wanted, False
            yield self._mirror.message(full=full)
            self._linked.set()  # asked for the next message: this one is on its way
            await asyncio.sleep(self._min_interval_s)
            if not self._snapshot_wanted:
                try:
                    await asyncio.wait_for(self._mirror.changed.wait(), _HEARTBEAT_S)
                except TimeoutError:
                    continue  # nothing new: a sign of life

    async def _obey(self, directive: planner_pb2.Directive) -> None:
        if directive.WhichOneof("directive") == "send_snapshot":
            self._snapshot_wanted = True
            self._mirror.changed.set()
        else:
            await self._on_directive(directive)
