"""The duplex local socket that joins the engine process and the worker process: state out, directives in.

One ZeroMQ PAIR socket over ipc, in a private directory that only this user can enter. Messages are msgspec structs in
msgpack. The worker binds before the engine process starts; the hook connects.
"""

import shutil
import tempfile
from pathlib import Path
from typing import cast

import msgspec
import zmq
import zmq.asyncio

from services.core.constraint import Constraint

__all__ = [
    "DecidedEntry",
    "Directive",
    "ExpectPromises",
    "HookEnd",
    "LinkPath",
    "ModelTerms",
    "Promote",
    "Reforecast",
    "ReportMessage",
    "RequestEntry",
    "SetCap",
    "SetModel",
    "WorkerEnd",
]


class ModelTerms(msgspec.Struct, frozen=True, array_like=True):
    """A performance model on the wire: one row (k_tok, k_ctx, k_req, k_step, b) per segment, seconds."""

    rows: tuple[tuple[float, float, float, float, float], ...]
    margin_s: float
    r2: float | None
    attention: float = 0.0


class Promote(msgspec.Struct, frozen=True, tag="promote"):
    """Make a best-effort request a promised one on `tier`."""

    request_id: str
    tier: str


class Reforecast(msgspec.Struct, frozen=True, tag="reforecast"):
    """Expect the request's attempt to produce `output_tokens` in all."""

    request_id: str
    output_tokens: int


class SetCap(msgspec.Struct, frozen=True, tag="cap"):
    """Cap the duration of batches; None lifts the cap."""

    seconds: float | None


class ExpectPromises(msgspec.Struct, frozen=True, tag="expect"):
    """Keep batches short for as long as after a promise: somebody could not be given one because they were long."""


class SetModel(msgspec.Struct, frozen=True, tag="model"):
    """Plan with this performance model from now on."""

    model: ModelTerms


Directive = Promote | Reforecast | SetCap | ExpectPromises | SetModel


class RequestEntry(msgspec.Struct, frozen=True, array_like=True):
    """A request that is new to the report, or changed in more than its progress. `number` names it from then on."""

    number: int
    request_id: str
    attempt: int
    application: str
    tier: str
    promised: bool
    started: bool
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    forecast_tokens: int
    max_tokens: int
    ttft_deadline_s: float
    next_deadline_s: float
    tpot_s: float
    scheduled_at_s: float | None
    accepted_at_s: float


class DecidedEntry(msgspec.Struct, frozen=True, array_like=True):
    """The hook's word on request `number`; see `engine_api.RequestDecision`."""

    number: int
    admitted: bool
    predicted_ttft_s: float
    predicted_tpot_s: float
    constraint: Constraint
    tier: str
    retry_after_s: float


class ReportMessage(msgspec.Struct, frozen=True, array_like=True):
    """What the hook says after a step.

    `decoding` are the columns of all decoding requests, int64 and float64 in native order: number, computed tokens,
    output tokens, tokens still expected, deadline of the next token. `removed` and `released` are numbers. `batches`
    are rows of (tokens, context_tokens, requests, draft_steps, seconds). `acceptance` are the estimated rates of draft
    tokens by application, where one changed. `pauses` are those of `preemptions` that were promised decoders far ahead.
    """

    seq: int
    step: int
    observed_at_s: float
    entries: tuple[RequestEntry, ...]
    removed: tuple[int, ...]
    decoding: tuple[bytes, bytes, bytes, bytes, bytes]
    free_blocks: int
    total_blocks: int
    block_size: int
    max_num_seqs: int
    engine_free_at_s: float
    running: int
    waiting: int
    best_effort: int
    best_effort_prefill_tokens: int
    preemptions: int
    token_budget: int
    batches: tuple[tuple[int, int, int, int, float, float], ...]
    hook_us: float
    model: ModelTerms | None
    demoted: tuple[DecidedEntry, ...] = ()
    decided: tuple[DecidedEntry, ...] = ()
    released: tuple[int, ...] = ()
    acceptance: dict[str, float] | None = None
    pauses: int = 0


class LinkPath:
    """A private directory with the socket in it; `close` removes both."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="slos-link-"))

    @property
    def address(self) -> str:
        """The ZeroMQ address of the socket."""
        return f"ipc://{self._directory / 'hook'}"

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self._directory, ignore_errors=True)


class HookEnd:
    """The engine process's end: never blocks."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Directive)

    def directives(self) -> list[Directive]:
        """Directives that arrived since the last call, oldest first."""
        found: list[Directive] = []
        while cast("int", self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            found.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
        return found

    def report(self, message: ReportMessage) -> None:
        """Queue a report; the socket's queue is unbounded because a lost report could never be told apart from none."""
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Close the socket and its context."""
        self._context.destroy(linger=0)


class WorkerEnd:
    """The worker process's end, on its event loop."""

    def __init__(self, address: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ReportMessage)

    async def receive(self) -> ReportMessage:
        """The next report."""
        return self._decoder.decode(await self._socket.recv())

    def send(self, directive: Directive) -> None:
        """Send a directive; the hook reads it before its next step. The queue is unbounded, so this never waits."""
        self._socket.send(self._encoder.encode(directive))

    def close(self) -> None:
        """Close the socket and its context."""
        self._context.destroy(linger=0)
