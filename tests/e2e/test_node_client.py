"""A client in another language: Node.js with @grpc/grpc-js and protos loaded at run time."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from services.cli.stack import LocalStack
from tests.e2e.calls import generate, request

FOLDER = Path(__file__).parent / "node"
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.node,
    pytest.mark.skipif(
        shutil.which("node") is None or not (FOLDER / "node_modules").exists(), reason="Node.js is not installed"
    ),
]


async def test_node_client_reads_the_same_stream(emulated: LocalStack) -> None:
    message = request("chatbot", 50, 16, salt=90)
    process = await asyncio.create_subprocess_exec(
        "node",
        str(FOLDER / "generate.js"),
        emulated.admission_address,
        str(ROOT),
        "chatbot",
        *map(str, message.token_ids.ids),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 90)
    assert process.returncode == 0, err.decode()
    events = [json.loads(line) for line in out.decode().splitlines()]
    assert events[0]["event"] == "verdict"
    assert events[0]["verdict"]["kind"] == "VERDICT_KIND_ADMITTED"
    ids = [token for event in events if event["event"] == "tokens" for token in event["tokens"]["ids"]]
    same = await generate(emulated.admission_address, message)
    assert ids == same.ids
    assert events[-1]["event"] == "finished"
    assert events[-1]["finished"]["output_tokens"] == 16
