"""The planners, each asked about the replicas that fall to it."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import grpc
import grpc.aio

from protos import planner_pb2, planner_pb2_grpc, types_pb2
from services.common.errors import Reason, from_rpc_error
from services.common.rendezvous import planner_for
from services.common.rpc import open_channel

__all__ = ["Planners"]

_log = logging.getLogger(__name__)

_SETTLE_TIMEOUT_S = 1.0


class Planners:
    """One channel per planner. Confirming and freeing a reservation happens behind the answer to the client."""

    def __init__(self, addresses: Sequence[str], admit_timeout_s: float) -> None:
        self._addresses = tuple(addresses)
        self._admit_timeout_s = admit_timeout_s
        self._channels = {address: open_channel(address) for address in self._addresses}
        self._stubs = {address: planner_pb2_grpc.PlannerStub(channel) for address, channel in self._channels.items()}
        self._settling: set[asyncio.Task[None]] = set()

    def address_of(self, replica_id: str) -> str:
        """The planner that keeps the ledger of a replica."""
        return planner_for(replica_id, self._addresses)

    async def admit(self, replica_id: str, candidate: planner_pb2.Candidate) -> types_pb2.Verdict:
        """The verdict of one replica's planner; an admitted one is reserved there.

        Raises SloServeError: PLANNER_UNAVAILABLE where nobody answers in time, else what the planner said.
        """
        ask = planner_pb2.AdmitRequest(replica_id=replica_id, candidates=[candidate])
        try:
            answer = await self._stub(replica_id).Admit(ask, timeout=self._admit_timeout_s)
        except asyncio.CancelledError:  # whether it was reserved is unknown
            self.release(replica_id, candidate.request_id, candidate.attempt)
            raise
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.release(replica_id, candidate.request_id, candidate.attempt)
            raise from_rpc_error(error, Reason.PLANNER_UNAVAILABLE) from error
        verdict: types_pb2.Verdict = answer.verdicts[0].verdict
        return verdict

    async def quote(self, replica_id: str, candidate: planner_pb2.Candidate) -> planner_pb2.PlanQuoteResponse:
        """Whether one replica could promise it now, and what it could instead; raises as `admit` does."""
        ask = planner_pb2.PlanQuoteRequest(replica_id=replica_id, candidate=candidate)
        try:
            answer: planner_pb2.PlanQuoteResponse = await self._stub(replica_id).Quote(
                ask, timeout=self._admit_timeout_s
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, Reason.PLANNER_UNAVAILABLE) from error
        return answer

    async def explain(self, replica_id: str, request_id: str) -> types_pb2.Verdict | None:
        """The last verdict of one replica's planner on a request, None where it knows none; raises as `admit` does."""
        ask = planner_pb2.PlanExplainRequest(replica_id=replica_id, request_id=request_id)
        try:
            answer = await self._stub(replica_id).Explain(ask, timeout=self._admit_timeout_s)
        except grpc.aio.AioRpcError as raw:
            error = from_rpc_error(raw, Reason.PLANNER_UNAVAILABLE)
            if error.reason in (Reason.REQUEST_UNKNOWN, Reason.REPLICA_UNKNOWN):
                return None
            raise error from raw
        verdict: types_pb2.Verdict = answer.verdict
        return verdict

    def commit(self, replica_id: str, request_id: str, attempt: int) -> None:
        """Confirm a reservation: the request is in its queue."""
        request = planner_pb2.CommitRequest(replica_id=replica_id, request_id=request_id, attempt=attempt)
        self._settle(self._commit(replica_id, request))

    def release(self, replica_id: str, request_id: str, attempt: int) -> None:
        """Free a reservation that is not used after all."""
        request = planner_pb2.ReleaseRequest(replica_id=replica_id, request_id=request_id, attempt=attempt)
        self._settle(self._release(replica_id, request))

    async def settled(self) -> None:
        """Return once every confirmation under way has been answered."""
        await asyncio.gather(*self._settling, return_exceptions=True)

    async def close(self) -> None:
        """Finish what is being confirmed and close the channels."""
        await self.settled()
        for channel in self._channels.values():
            await channel.close()

    def _stub(self, replica_id: str) -> Any:
        return self._stubs[self.address_of(replica_id)]

    def _settle(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _commit(self, replica_id: str, request: planner_pb2.CommitRequest) -> None:
        try:
            answer = await self._stub(replica_id).Commit(request, timeout=_SETTLE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:  # the replica's own state will show the request
            _log.warning("promise of %s on %s is not confirmed: %s", request.request_id, replica_id, error.details())
            return
        if not answer.committed:
            _log.warning("reservation of %s on %s had run out", request.request_id, replica_id)

    async def _release(self, replica_id: str, request: planner_pb2.ReleaseRequest) -> None:
        try:
            await self._stub(replica_id).Release(request, timeout=_SETTLE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:  # it runs out by itself within seconds
            _log.info("reservation of %s on %s is not freed: %s", request.request_id, replica_id, error.details())
