"""A local stack whose own process is killed outright leaves no process behind, busy or not."""

import asyncio
import sys
from pathlib import Path

import psutil
import pytest

from services.cli.run_file import read_run_file
from tests.e2e.calls import Reply, admission, request
from tests.e2e.conftest import PRESET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked to end it, which is Linux's")

HOLDER = """
import asyncio, sys
from pathlib import Path
from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec

async def hold():
    spec = StackSpec(data_dir=Path(sys.argv[1]), engine="emulated", preset=sys.argv[2], drain_grace_s=2.0)
    async with LocalStack(spec):
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(hold())
"""
GONE_S = 40.0  # the drain grace, what a drain takes beyond it, and a busy machine


async def test_nothing_outlives_a_stack_that_was_killed_while_it_served(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(tmp_path), PRESET), stdout=asyncio.subprocess.PIPE
    )
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"up\n"
    addresses = read_run_file(tmp_path)
    assert addresses is not None
    processes = psutil.Process(holder.pid).children(recursive=True)
    assert len(processes) >= 6  # Redis, four services and the engine
    async with admission(addresses.admission[0]) as stub:
        reply = Reply()
        async for event in stub.Generate(request("chatbot", 100, 2000), timeout=60):
            reply.take(event)
            if reply.ids:
                break
        holder.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=GONE_S)
    try:
        assert not [" ".join(process.cmdline()) for process in alive]
    finally:
        for process in alive:
            process.kill()
