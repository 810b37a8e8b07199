"""Calls as a client makes them, on the bare stubs, and what came back."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from protos import admission_pb2, admission_pb2_grpc, types_pb2


@dataclass
class Reply:
    """Everything one call streamed back."""

    verdicts: list[types_pb2.Verdict] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    stage_ends: list[admission_pb2.StageEnd] = field(default_factory=list)
    finished: admission_pb2.Finished | None = None
    request_id: str = ""
    order: list[str] = field(default_factory=list)

    def take(self, event: admission_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        self.order.append(kind)
        self.request_id = event.request_id
        match kind:
            case "verdict":
                self.verdicts.append(event.verdict)
            case "tokens":
                assert event.tokens.offset == len(self.ids), "a gap or a repetition in the token offsets"
                self.ids.extend(event.tokens.ids)
                self.text += event.tokens.text
            case "stage_end":
                self.stage_ends.append(event.stage_end)
            case "finished":
                self.finished = event.finished

    @property
    def verdict(self) -> types_pb2.Verdict:
        return self.verdicts[-1]


@asynccontextmanager
async def admission(address: str) -> AsyncIterator["admission_pb2_grpc.AdmissionAsyncStub"]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield admission_pb2_grpc.AdmissionStub(channel)


def request(
    application: str = "chatbot", prompt_tokens: int = 40, max_tokens: int = 12, **fields: object
) -> admission_pb2.GenerateRequest:
    """A request with a prompt of ordinary token ids that no other test uses (`salt` varies it)."""
    salt = int(fields.pop("salt", 0))
    ids = [20 + (7 * i + 131 * salt) % 3000 for i in range(prompt_tokens)]
    fields.setdefault("sampling", types_pb2.Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    fields.setdefault("token_ids", admission_pb2.TokenIds(ids=ids))
    return admission_pb2.GenerateRequest(application=application, **fields)


async def generate(address: str, message: admission_pb2.GenerateRequest, timeout_s: float = 60.0) -> Reply:
    """Run one request to its end."""
    reply = Reply()
    async with admission(address) as stub:
        async for event in stub.Generate(message, timeout=timeout_s):
            reply.take(event)
    return reply
