"""What a live load is sent to: the full stack over gRPC, or vLLM as it is."""

from collections.abc import AsyncIterator
from typing import Protocol

import grpc
import grpc.aio

from bench.bare_engine import BareEngine
from bench.simulator_call import LiveCall
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.common.wire import stage_kind_to_wire

__all__ = ["BareTarget", "ServicesTarget", "Target"]


class Target(Protocol):
    """Serves calls. `promises`: some of them are promised."""

    name: str
    promises: bool

    def send(self, call: LiveCall, prompt: tuple[int, ...], key: str) -> AsyncIterator[tuple[int, ...]]:
        """New token ids as they come. Sets `refused` on a call that was turned away, and what was promised."""
        ...


class BareTarget:
    """Plain vLLM, in this process as in the worker's."""

    promises = False

    def __init__(self, engine: BareEngine) -> None:
        self.name = "vllm"
        self._engine = engine

    async def send(self, call: LiveCall, prompt: tuple[int, ...], key: str) -> AsyncIterator[tuple[int, ...]]:
        """Run it."""
        async for ids in self._engine.generate(key, prompt, call.call.output_tokens):
            yield ids


class ServicesTarget:
    """The front door. `kept_by_service` collects, per promised call, whether the services say that they kept it."""

    promises = True

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.name = "slos-serve"
        self.kept_by_service: list[bool] = []
        self.errors: list[str] = []
        self._stub = admission_pb2_grpc.AdmissionStub(channel)

    async def send(self, call: LiveCall, prompt: tuple[int, ...], key: str) -> AsyncIterator[tuple[int, ...]]:
        """Generate with the call's own stages; an error ends the call unanswered and is remembered."""
        stream = self._stub.Generate(_request(call, prompt))
        try:
            async for event in stream:
                match event.WhichOneof("event"):
                    case "tokens":
                        yield tuple(event.tokens.ids)
                    case "verdict":
                        _note(call, event.verdict)
                    case "verdict_changed":
                        _note(call, event.verdict_changed.verdict)
                    case "finished":
                        if event.finished.promised:
                            self.kept_by_service.append(event.finished.met)
        except grpc.aio.AioRpcError as error:
            call.refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            self.errors.append(f"{call.job.application}: {error.code().name}: {error.details()}")
        finally:
            stream.cancel()  # of no effect on a call that is over


def _note(call: LiveCall, verdict: types_pb2.Verdict) -> None:
    if verdict.kind == types_pb2.VERDICT_KIND_ADMITTED and call.promised_s is None:
        call.promised_s = call.arrival_s + verdict.predicted_ttft_ms / 1000


def _request(call: LiveCall, prompt: tuple[int, ...]) -> admission_pb2.GenerateRequest:
    stages = [
        types_pb2.StageSpec(kind=stage_kind_to_wire(stage.kind), tpot_ms=stage.tpot_s * 1000, max_tokens=stage.tokens)
        for stage in call.call.stages
    ]
    stages[0].ttft_ms = call.call.ttft_s * 1000
    return admission_pb2.GenerateRequest(
        token_ids=admission_pb2.TokenIds(ids=prompt),
        application=call.job.application,
        stages=stages,
        sampling=types_pb2.Sampling(max_tokens=call.call.output_tokens, ignore_eos=True, temperature=0.0),
    )
