"""The health check of containers: exit status and what it says."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cli.health import main, why_unhealthy
from services.cli.ports import find_free_ports
from services.common.rpc import RpcServer

ROOT = Path(__file__).parents[3]


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    server = RpcServer("127.0.0.1:0")
    await server.start(["slosserve.v1.Router"])
    yield server
    await server.stop(0)


async def check(*addresses: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli.health", *addresses), cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, errors.decode()


async def test_a_serving_service_is_healthy_and_a_draining_one_is_not(server: RpcServer) -> None:
    address = f"127.0.0.1:{server.port}"
    assert await check(address) == (0, "")
    await server.set_serving(False)
    assert await check(address) == (1, f"{address}: NOT_SERVING\n")


async def test_every_address_must_be_healthy(server: RpcServer) -> None:
    nobody = f"127.0.0.1:{find_free_ports(1)[0]}"
    status, errors = await check(f"127.0.0.1:{server.port}", nobody)
    assert status == 1
    assert errors.startswith(f"{nobody}: UNAVAILABLE")


def test_a_service_that_does_not_answer_in_time_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        why = why_unhealthy(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
    assert why.startswith("DEADLINE_EXCEEDED")


def test_no_address_is_a_mistake_of_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_it_needs_no_command_line_library() -> None:
    code = (
        "import sys, services.cli.health; sys.exit(any(n in sys.modules for n in ('typer', 'rich', 'numba', 'redis')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
