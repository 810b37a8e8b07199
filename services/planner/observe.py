"""One worker's stream: its states go into the ledger, directives come back.

A stream begins with a full state; where it does not, and at every gap in the numbers, a snapshot is asked for. A state
that cannot be true ends the stream with its error; the worker comes back with a full one.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from protos import planner_pb2
from services.common.clock import Clock
from services.common.errors import FieldViolation, InvalidRequestError, Reason, SloServeError
from services.core.slo import Tier
from services.planner.audit import Auditor
from services.planner.fleet import Fleet, PlannedReplica
from services.planner.ledger import Applied
from services.planner.promote import promotable
from services.planner.state import parse_state

__all__ = ["Observer"]

_PROMOTE_EVERY_S = 0.05
_SAME_CAP = 0.01  # relative: a shift of less is not worth a message


class Directives:
    """What is to be sent to one worker, numbered from 1."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[planner_pb2.Directive | None] = asyncio.Queue()
        self._seq = 0
        self._snapshot_asked = False
        self._cap_s = 0.0

    def cap_changed(self, cap_s: float) -> bool:
        """Whether this cap on batches is news to the worker; it is taken to be told."""
        changed = not math.isclose(cap_s, self._cap_s, rel_tol=_SAME_CAP)
        if changed:
            self._cap_s = cap_s
        return changed

    def send(self, **directive: Any) -> None:
        """Queue one directive, given by its field in the message."""
        self._seq += 1
        self._queue.put_nowait(planner_pb2.Directive(seq=self._seq, **directive))

    def ask_snapshot(self) -> None:
        """Ask for a full state, unless that was asked already and is still to come."""
        if not self._snapshot_asked:
            self._snapshot_asked = True
            self.send(send_snapshot=planner_pb2.SendSnapshot())

    def snapshot_came(self) -> None:
        """A full state has arrived."""
        self._snapshot_asked = False

    def close(self, reader: "asyncio.Task[None]") -> None:
        """The stream of states is over: no more directives will come."""
        if not reader.cancelled():
            reader.exception()  # seen, even where the worker has hung up and nobody waits for it
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[planner_pb2.Directive]:
        while (directive := await self._queue.get()) is not None:
            yield directive


class Observer:
    """Serves Observe streams of all replicas."""

    def __init__(self, fleet: Fleet, auditor: Auditor, *, tiers: Sequence[Tier], clock: Clock) -> None:
        self._fleet = fleet
        self._auditor = auditor
        self._tiers = tiers
        self._clock = clock
        self._outboxes: dict[str, Directives] = {}

    async def serve(self, states: AsyncIterator[planner_pb2.ReplicaState]) -> AsyncGenerator[planner_pb2.Directive]:
        """Read states until the stream ends or is refused; yield directives meanwhile."""
        outbox = Directives()
        reader = asyncio.create_task(self._read(states, outbox))
        reader.add_done_callback(outbox.close)
        try:
            async for directive in outbox:
                yield directive
            await reader  # raises what refused the stream
        finally:
            reader.cancel()

    def release(self, replica_id: str, request_id: str, attempt: int) -> None:
        """Tell the replica's worker that a request it has is no longer wanted."""
        outbox = self._outboxes.get(replica_id)
        if outbox is not None:
            outbox.send(release=planner_pb2.ReleaseRequestId(request_id=request_id, attempt=attempt))

    async def _read(self, states: AsyncIterator[planner_pb2.ReplicaState], outbox: Directives) -> None:
        replica: PlannedReplica | None = None
        connection = 0
        try:
            async for state in states:
                if replica is None:
                    if not state.replica_id:
                        raise InvalidRequestError(FieldViolation("replica_id", "must not be empty"))
                    replica = self._fleet.connect(state.replica_id)
                    connection = replica.connection
                    self._outboxes[state.replica_id] = outbox
                self._check_stream(state, replica, connection)
                self._take(state, replica, outbox)
        finally:
            if replica is not None and replica.connection == connection:
                replica.ledger.disconnect()
                del self._outboxes[replica.ledger.replica_id]

    def _check_stream(self, state: planner_pb2.ReplicaState, replica: PlannedReplica, connection: int) -> None:
        expected = replica.ledger.replica_id
        if state.replica_id != expected:
            text = f"the stream of replica {expected} carries a state of {state.replica_id!r}"
            raise SloServeError(Reason.STATE_INVALID, text)
        if replica.connection != connection:
            raise SloServeError(Reason.STATE_INVALID, f"replica {expected} has opened a newer stream")

    def _take(self, state: planner_pb2.ReplicaState, replica: PlannedReplica, outbox: Directives) -> None:
        update = parse_state(state, tiers=self._tiers, clock=self._clock)
        applied = replica.ledger.apply(update)
        self._auditor.finished(state.finished, replica.ledger.history)
        if applied is Applied.GAP:
            outbox.ask_snapshot()
            return
        if state.full:
            outbox.snapshot_came()
        self._promote(replica, outbox)
        self._send_parameters(replica, outbox)

    def _send_parameters(self, replica: PlannedReplica, outbox: Directives) -> None:
        """Tell the worker how long its batches may last, where that has changed or they were too long for somebody."""
        cap_s, wanted = replica.promises.caps_s[0], replica.promises.take_turned_away()
        if outbox.cap_changed(cap_s) or wanted:
            parameters = planner_pb2.BatchParameters(duration_cap_ms=cap_s * 1000, promises_wanted=wanted)
            outbox.send(batch_parameters=parameters)

    def _promote(self, replica: PlannedReplica, outbox: Directives) -> None:
        """Offer waiting best-effort requests again, now and then."""
        now_s = self._clock.now_s()
        if now_s - replica.promoted_at_s < _PROMOTE_EVERY_S:
            return
        candidates = promotable(replica.ledger, self._tiers, self._clock)
        if not candidates:
            return
        replica.promoted_at_s = now_s
        for candidate, verdict in replica.promises.promote(candidates):
            outbox.send(
                promote=planner_pb2.Promote(
                    request_id=candidate.prefill.id, attempt=candidate.attempt, tier=verdict.tier, verdict=verdict
                )
            )
