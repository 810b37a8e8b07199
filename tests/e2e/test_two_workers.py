"""Two replicas: both are used, every token is the one it must be, and the queues are empty afterwards."""

import asyncio
import hashlib
import json
from array import array
from typing import Any

import pytest
import redis.asyncio

from protos import admission_pb2
from services.cli.stack import LocalStack
from services.cli.stack_spec import BUNDLED_MODEL
from services.worker.hash_tokens import HashTokens
from tests.e2e.calls import generate, request

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_concurrent_requests_use_both_replicas_and_lose_nothing(emulated: LocalStack) -> None:
    messages = [request("chatbot", 1500 + i, 30, salt=10 + i) for i in range(24)]
    replies = await asyncio.gather(*(generate(emulated.admission_address, message) for message in messages))
    assert {reply.finished.replica_id for reply in replies} == {"w0", "w1"}
    for message, reply in zip(messages, replies, strict=True):
        assert len(reply.ids) == 30
        assert reply.ids == expected(message, 30)


def expected(message: admission_pb2.GenerateRequest, count: int) -> list[int]:
    """What the emulated engine must produce for a prompt, from the definition of its tokens."""
    ids = list(message.token_ids.ids)
    digest = hashlib.sha256(array("I", ids).tobytes()).hexdigest()
    special = [token["id"] for token in read_json("tokenizer.json")["added_tokens"] if token["special"]]
    return HashTokens(read_json("config.json")["vocab_size"], special).continuation(digest, len(ids), count)


def read_json(name: str) -> dict[str, Any]:
    return json.loads((BUNDLED_MODEL / name).read_text(encoding="utf-8"))


async def test_queues_are_empty_once_every_request_has_ended(emulated: LocalStack) -> None:
    await generate(emulated.admission_address, request("coder", 80, 6, salt=50))
    connection = redis.asyncio.from_url(emulated.redis_url)
    try:
        streams = [key async for key in connection.scan_iter("slos:q:*")]
        assert streams
        for stream in streams:
            assert await connection.xlen(stream) == 0, stream
            for group in await connection.xinfo_groups(stream):
                assert group["pending"] == 0, stream
    finally:
        await connection.aclose()
