"""Very many streams at once, and clients that do not read."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import grpc
import grpc.aio
from grpc_status import rpc_status

from bench.metrics import quantile
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.common.errors import from_rpc_error

__all__ = ["Streams", "open_streams", "slow_readers"]

_PER_CHANNEL = 1000
_SLOW_S = 5.0


@dataclass(slots=True)
class Streams:
    """What became of `wanted` streams that were asked for at once; whoever was told to come back later did.

    `ended`: how each stood in the end. `refused`: answers that said when to come back. `without_reason`: calls that the
    server ended without saying why. `most_open`: streams that had their verdict and were open at the same time.
    `answered_s`: from the first call to the verdict; p50, p90 and the last.
    """

    wanted: int
    ended: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    without_reason: int = 0
    most_open: int = 0
    answered_s: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def clean(self) -> bool:
        """Every call was answered with a verdict or a reason, or ended by its client."""
        return self.without_reason == 0 and sum(self.ended.values()) == self.wanted


class _Crowd:
    """The clients. Each holds its stream until `end_s`, then hangs up."""

    def __init__(self, found: Streams, hold_s: float) -> None:
        self._found = found
        self._began_s = time.monotonic()
        self._end_s = self._began_s + hold_s
        self._open = 0
        self._source = random.Random(7)
        self.ended = Counter[str]()
        self.answered_s: list[float] = []

    async def one(self, stub: "admission_pb2_grpc.AdmissionAsyncStub") -> None:
        """One client, to its end."""
        while True:
            how, delay_s = await self._call(stub)
            left_s = self._end_s - time.monotonic()
            if delay_s is None:
                self.ended[how] += 1
                return
            self._found.refused += 1
            if delay_s >= left_s:
                self.ended["told to come back later than the end"] += 1
                return
            await asyncio.sleep(delay_s)

    async def _call(self, stub: "admission_pb2_grpc.AdmissionAsyncStub") -> tuple[str, float | None]:
        """How a call ended, and after how long to come back where it was refused."""
        call = stub.Generate(_request(self._source, 400))
        answered = False
        try:
            async with asyncio.timeout(self._end_s - time.monotonic()):
                async for event in call:
                    if not answered:
                        answered = True
                        self._answered()
                    if event.WhichOneof("event") == "finished":
                        return "finished", None
            return "ended without `finished`", None
        except TimeoutError:
            return f"hung up by its client, {'after its verdict' if answered else 'still without an answer'}", None
        except grpc.aio.AioRpcError as error:
            if rpc_status.from_call(cast("grpc.Call", error)) is None:
                self._found.without_reason += 1
                return f"{error.code().name} without a reason: {error.details()}", None
            typed = from_rpc_error(error)
            return typed.reason.value, None if typed.retry_after_ms is None else typed.retry_after_ms / 1000
        finally:
            self._open -= answered
            call.cancel()

    def _answered(self) -> None:
        self._open += 1
        self._found.most_open = max(self._found.most_open, self._open)
        self.answered_s.append(time.monotonic() - self._began_s)


async def open_streams(address: str, count: int, hold_s: float) -> Streams:
    """Open `count` streams at once and hold them for `hold_s` seconds, then hang up."""
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-count // _PER_CHANNEL))
    ]
    stubs = [admission_pb2_grpc.AdmissionStub(channel) for channel in channels]
    found = Streams(count)
    crowd = _Crowd(found, hold_s)
    await asyncio.gather(*(crowd.one(stubs[number // _PER_CHANNEL]) for number in range(count)))
    for channel in channels:
        await channel.close()
    found.ended = dict(crowd.ended.most_common())
    answered_s = sorted(crowd.answered_s)
    found.answered_s = (quantile(answered_s, 0.5), quantile(answered_s, 0.9), quantile(answered_s, 1.0))
    return found


async def slow_readers(address: str, count: int) -> int:
    """Clients that read nothing for five seconds; how many have their whole answer in the end."""
    source = random.Random(9)

    async def one() -> bool:
        async with grpc.aio.insecure_channel(address) as channel:
            call = admission_pb2_grpc.AdmissionStub(channel).Generate(_request(source, 200), timeout=120)
            tokens, first = 0, True
            async for event in call:
                if event.WhichOneof("event") == "tokens":
                    tokens += len(event.tokens.ids)
                if first:
                    await asyncio.sleep(_SLOW_S)
                    first = False
            return tokens == 200

    return sum(await asyncio.gather(*(one() for _ in range(count))))


def _request(source: random.Random, tokens: int) -> admission_pb2.GenerateRequest:
    """A request for so many tokens, of a client that takes best effort."""
    return admission_pb2.GenerateRequest(
        application="summarizer",
        token_ids=admission_pb2.TokenIds(ids=[source.randint(20, 3500) for _ in range(20)]),
        sampling=types_pb2.Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True),
    )
