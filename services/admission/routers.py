"""The routers, as one that is there: any of them serves any request, so a silent one is passed over."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from protos import router_pb2, router_pb2_grpc, types_pb2
from services.common.errors import Reason, SloServeError, from_rpc_error
from services.common.rpc import open_channel

__all__ = ["Routers"]

ROUTER_RETRY_MS = 1000.0
_CALL_TIMEOUT_S = 10.0

T = TypeVar("T")


class Routers:
    """Asks the configured routers, in turn. Placing is idempotent by attempt."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._channels = [open_channel(address) for address in addresses]
        self._stubs = [router_pb2_grpc.RouterStub(channel) for channel in self._channels]
        self._turn = 0

    async def place(
        self,
        request: types_pb2.QueuedRequest,
        on_infeasible: types_pb2.OnInfeasible.ValueType,
        remaining_s: float | None,
        previous_request_id: str = "",
    ) -> router_pb2.PlaceResponse:
        """Place a request, near an earlier one of its session if one is named.

        `remaining_s` is what its client's deadline leaves, None where it has none.

        Raises the router's own error (such as NO_CAPACITY with the verdict in its details), CLIENT_DEADLINE, or
        ROUTER_UNAVAILABLE where no router answered.
        """
        message = router_pb2.PlaceRequest(
            request=request, on_infeasible=on_infeasible, previous_request_id=previous_request_id
        )
        waits = on_infeasible == types_pb2.ON_INFEASIBLE_WAIT
        return await self._within(
            lambda stub, timeout_s: stub.Place(message, timeout=timeout_s, wait_for_ready=False),
            own_limit_s=None if waits else _CALL_TIMEOUT_S,
            remaining_s=remaining_s,
        )

    async def quote(
        self, request: types_pb2.QueuedRequest, remaining_s: float | None
    ) -> router_pb2.RouterQuoteResponse:
        """The fleet's best answer to whether a request would fit; raises as `place` does."""
        message = router_pb2.RouterQuoteRequest(request=request)
        return await self._within(
            lambda stub, timeout_s: stub.Quote(message, timeout=timeout_s),
            own_limit_s=_CALL_TIMEOUT_S,
            remaining_s=remaining_s,
        )

    async def explain(self, request_id: str) -> router_pb2.RouterExplainResponse:
        """What the planners remember about a request."""
        message = router_pb2.RouterExplainRequest(request_id=request_id)
        return await self._first_answer(lambda stub: stub.Explain(message, timeout=_CALL_TIMEOUT_S))

    async def replace(
        self, request_id: str, attempt: int, delivered_token_ids: Sequence[int], reason: str
    ) -> router_pb2.PlaceResponse:
        """Place a request again whose `attempt` failed."""
        message = router_pb2.ReplaceRequest(
            request_id=request_id, attempt=attempt, delivered_token_ids=delivered_token_ids, reason=reason
        )
        return await self._first_answer(lambda stub: stub.Replace(message, timeout=_CALL_TIMEOUT_S))

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()

    async def _within(
        self,
        call: "Callable[[router_pb2_grpc.RouterAsyncStub, float | None], Awaitable[T]]",
        *,
        own_limit_s: float | None,
        remaining_s: float | None,
    ) -> T:
        """A call that ends with the client's deadline or after our own limit; the errors tell which it was."""
        limits = [limit for limit in (own_limit_s, remaining_s) if limit is not None]
        timeout_s = min(limits) if limits else None
        try:
            return await self._first_answer(lambda stub: call(stub, timeout_s))
        except SloServeError as error:
            late = error.reason is Reason.CLIENT_DEADLINE
            if late and timeout_s != remaining_s:
                text = f"no answer within {timeout_s:g} s"
                raise SloServeError(Reason.ROUTER_UNAVAILABLE, text, retry_after_ms=ROUTER_RETRY_MS) from None
            raise

    async def _first_answer(self, call: "Callable[[router_pb2_grpc.RouterAsyncStub], Awaitable[T]]") -> T:
        error: SloServeError | None = None
        start, self._turn = self._turn, (self._turn + 1) % len(self._stubs)
        for offset in range(len(self._stubs)):
            try:
                return await call(self._stubs[(start + offset) % len(self._stubs)])
            except grpc.RpcError as raw:
                error = _typed(raw)
                if error.reason is not Reason.ROUTER_UNAVAILABLE:
                    raise error from None
        assert error is not None, "the settings require a router"
        raise error


def _typed(raw: grpc.RpcError) -> SloServeError:
    code = raw.code() if isinstance(raw, grpc.aio.AioRpcError) else None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return from_rpc_error(raw, Reason.CLIENT_DEADLINE)
    error = from_rpc_error(raw, Reason.ROUTER_UNAVAILABLE)
    if error.reason is Reason.ROUTER_UNAVAILABLE:
        text = f"no router answered: {error.text}"
        return SloServeError(Reason.ROUTER_UNAVAILABLE, text, retry_after_ms=ROUTER_RETRY_MS)
    return error
