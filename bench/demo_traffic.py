"""Sends the demo's requests open loop, each at its own time, and records what comes back."""

import asyncio
from collections.abc import Callable, Sequence

import grpc

from bench.demo_outcome import Outcome, Progress
from bench.prompts import PromptMaker
from protos import admission_pb2, admission_pb2_grpc, types_pb2
from services.common.errors import Reason, from_rpc_error
from services.common.rpc import open_channel

__all__ = ["send_all"]


async def send_all(
    address: str, outcomes: Sequence[Outcome], prompts: PromptMaker, on_change: Callable[[], None]
) -> None:
    """Send every request at its `at_s` from now, return when all have ended. Prompts are made before the clock runs."""
    texts = [prompts.text(outcome.request.prompt_tokens, outcome.request.seed) for outcome in outcomes]
    began_s = asyncio.get_running_loop().time()
    async with open_channel(address, traced=False) as channel, asyncio.TaskGroup() as group:
        stub = admission_pb2_grpc.AdmissionStub(channel)
        for outcome, text in zip(outcomes, texts, strict=True):
            group.create_task(_send(stub, outcome, text, began_s + outcome.request.at_s, on_change))


def _message(outcome: Outcome, text: str) -> admission_pb2.GenerateRequest:
    tokens = outcome.request.output_tokens
    return admission_pb2.GenerateRequest(
        text=text,
        application=outcome.request.application,
        # As many tokens as the trace recorded, whatever this model would have said.
        sampling=types_pb2.Sampling(max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0.7),
    )


async def _send(
    stub: "admission_pb2_grpc.AdmissionAsyncStub",
    outcome: Outcome,
    text: str,
    at_s: float,
    on_change: Callable[[], None],
) -> None:
    await asyncio.sleep(max(0.0, at_s - asyncio.get_running_loop().time()))
    outcome.progress = Progress.SENT
    on_change()
    try:
        async for event in stub.Generate(_message(outcome, text)):
            _note(outcome, event)
            on_change()
    except grpc.RpcError as failure:
        error = from_rpc_error(failure)
        shed = error.reason is Reason.NO_CAPACITY
        outcome.progress = Progress.REJECTED if shed else Progress.FAILED
        outcome.error = f"{error.reason.value}: {error.text}"
        on_change()
        return
    if outcome.finished is None:
        outcome.progress = Progress.FAILED
        outcome.error = "the stream ended without a last message"
        on_change()


def _note(outcome: Outcome, event: admission_pb2.GenerateEvent) -> None:
    match event.WhichOneof("event"):
        case "verdict":
            outcome.verdict = event.verdict
        case "tokens":
            outcome.progress = Progress.STREAMING
            outcome.num_tokens += len(event.tokens.ids)
        case "verdict_changed":
            outcome.verdict, outcome.changed = event.verdict_changed.verdict, True
        case "finished":
            outcome.finished = event.finished
            ended_well = event.finished.reason in (types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH)
            outcome.progress = Progress.ANSWERED if ended_well else Progress.FAILED
            if not ended_well:
                outcome.error = f"ended with {types_pb2.FinishReason.Name(event.finished.reason)}"
        case _:
            pass  # stage ends are in `finished` too
