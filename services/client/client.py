"""The typed asynchronous client of the front door."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc

from protos import admission_pb2, admission_pb2_grpc
from services.client.answers import Explanation, Quote, explanation_from_wire, quote_from_wire
from services.client.events import Event, Finished, Tokens, Verdict, VerdictChanged, event_from_wire
from services.client.requests import OnInfeasible, Prompt, Stage, request_to_wire
from services.common.errors import Reason, SloServeError, from_rpc_error
from services.common.rpc import open_channel

__all__ = ["Completion", "GenerateOptions", "SlosClient"]

Call = grpc.aio.UnaryStreamCall[Any, admission_pb2.GenerateEvent]

_RESUME_DELAY_S = 0.1
_FALLBACKS = {
    grpc.StatusCode.CANCELLED: Reason.REQUEST_CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.CLIENT_DEADLINE,
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_FIELD,
    grpc.StatusCode.UNAVAILABLE: Reason.ADMISSION_UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED: Reason.NOT_IMPLEMENTED,
}
_BROKEN_STREAM = (Reason.ADMISSION_UNAVAILABLE, Reason.ADMISSION_DRAINING)


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `complete`; `application` or `stages` is needed. See docs/api.md."""

    request_id: str
    application: str
    stages: "list[Stage] | tuple[Stage, ...]"
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: "list[str] | tuple[str, ...]"
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    min_tokens: int | None
    ignore_eos: bool | None
    on_infeasible: OnInfeasible | None
    resume_grace_s: float
    templated: bool
    previous_request_id: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole response. `verdict` is the one in force at the end, `finished` the promised-against-delivered report."""

    request_id: str
    text: str
    ids: tuple[int, ...]
    verdict: Verdict
    finished: Finished


class SlosClient:
    """Talks to an admission process. Usage: `async with SlosClient("host:50051", key=None) as client: ...`.

    Calls raise SloServeError with the server's reason, InvalidRequestError with its field violations.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self._channel = open_channel(address)
        self._stub = admission_pb2_grpc.AdmissionStub(self._channel)
        self._metadata: tuple[tuple[str, str], ...] = (("authorization", f"Bearer {key}"),) if key else ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; open streams end."""
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[Event]:
        """The events of one request, verdict first, `Finished` last. Leaving the loop early cancels the request.

        With `resume_grace_s`, a broken connection is resumed for that long; a verdict is not repeated then.
        """
        request = request_to_wire(prompt, **options)
        request.request_id = request.request_id or (uuid.uuid4().hex if request.resume_grace_s else "")
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        next_token, verdict, give_up_s = 0, None, 0.0
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        while True:
            try:
                async for event in _events(call):
                    give_up_s = time.monotonic() + request.resume_grace_s
                    if isinstance(event, Tokens):
                        next_token = event.offset + len(event.ids)
                    if event != verdict:
                        yield event
                    if isinstance(event, Verdict):
                        verdict = event
                return
            except SloServeError as error:
                if error.reason not in _BROKEN_STREAM or verdict is None or time.monotonic() >= give_up_s:
                    raise
            await asyncio.sleep(_RESUME_DELAY_S)
            call = self._resume(request.request_id, next_token, _left_s(end_s))

    async def resume(
        self, request_id: str, from_token: int = 0, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """The events of a request that is already there, its output from `from_token` on."""
        async for event in _events(self._resume(request_id, from_token, timeout_s)):
            yield event

    async def complete(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Completion:
        """The whole response at once."""
        options = {"request_id": uuid.uuid4().hex, **options}
        texts: list[str] = []
        ids: list[int] = []
        verdict: Verdict | None = None
        async for event in self.generate(prompt, timeout_s=timeout_s, **options):
            match event:
                case Tokens():
                    texts.append(event.text)
                    ids += event.ids
                case Verdict():
                    verdict = event
                case VerdictChanged():
                    verdict = event.verdict
                case Finished() if verdict is not None:
                    return Completion(options["request_id"], "".join(texts), tuple(ids), verdict, event)
        raise SloServeError(Reason.INTERNAL, "the stream ended without a finished event")

    async def cancel(self, request_id: str) -> bool:
        """End a request; False where it had already ended."""
        try:
            request = admission_pb2.CancelRequest(request_id=request_id)
            return (await self._stub.Cancel(request, metadata=self._metadata)).cancelled
        except grpc.RpcError as error:
            raise _typed(error) from None

    async def quote(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Quote:
        """Whether `generate` with the same arguments would be promised now. Nothing is begun or reserved."""
        request = admission_pb2.QuoteRequest(request=request_to_wire(prompt, **options))
        try:
            return quote_from_wire(await self._stub.Quote(request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _typed(error) from None

    async def explain(self, request_id: str, *, timeout_s: float | None = None) -> Explanation:
        """Why a request was deferred, rejected or late."""
        request = admission_pb2.ExplainRequest(request_id=request_id)
        try:
            answer = await self._stub.Explain(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _typed(error) from None
        return explanation_from_wire(answer)

    def _resume(self, request_id: str, from_token: int, timeout_s: float | None) -> Call:
        request = admission_pb2.ResumeRequest(request_id=request_id, from_token=from_token)
        return self._stub.Resume(request, timeout=timeout_s, metadata=self._metadata)


async def _events(call: Call) -> AsyncIterator[Event]:
    try:
        async for wire in call:
            event = event_from_wire(wire)
            if event is not None:
                yield event
    except grpc.RpcError as error:
        raise _typed(error) from None
    finally:
        call.cancel()  # of no effect on a call that is over


def _left_s(end_s: float | None) -> float | None:
    return None if end_s is None else max(0.0, end_s - time.monotonic())


def _typed(error: grpc.RpcError) -> SloServeError:
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    fallback = _FALLBACKS.get(code, Reason.INTERNAL) if code is not None else Reason.INTERNAL
    return from_rpc_error(error, fallback)
