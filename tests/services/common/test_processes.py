import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

SERVICE = """
import asyncio, sys
from services.common.config import ServiceSettings
from services.common.errors import Reason, SloServeError
from services.common.processes import announce, run_service

async def serve(settings, stop):
    announce("test", settings.host, 1)
    if "fail" in sys.argv:
        raise SloServeError(Reason.BROKER_UNAVAILABLE, "no Redis at all")
    await stop.wait()
    print("draining", flush=True)
    if "stubborn" in sys.argv:
        await asyncio.Event().wait()
    print("drained", flush=True)

sys.exit(run_service(ServiceSettings, serve))
"""


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLOS_")}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVICE, *arguments),
        cwd=ROOT,
        env={**kept, "SLOS_REDIS_URL": "redis://127.0.0.1:1/0", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()


async def end(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    _, errors = await asyncio.wait_for(process.communicate(), 20)
    return process.returncode, errors.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_one_signal_drains_and_ends_well(number: signal.Signals) -> None:
    process = await start()
    assert await line(process) == "test ready on 127.0.0.1:1"
    process.send_signal(number)
    assert [await line(process), await line(process)] == ["draining", "drained"]
    assert await end(process) == (0, "")


async def test_a_second_signal_ends_a_drain_that_hangs() -> None:
    process = await start("stubborn")
    await line(process)
    process.send_signal(signal.SIGTERM)
    assert await line(process) == "draining"
    process.send_signal(signal.SIGTERM)
    status, errors = await end(process)
    assert status == 1
    assert errors == "stopped before everything was drained\n"


async def test_what_is_absent_at_the_start_is_named_on_one_line() -> None:
    assert await end(await start("fail")) == (3, "no Redis at all\n")


async def test_a_bad_variable_is_named() -> None:
    status, errors = await end(await start(SLOS_LOG_LEVEL="LOUD"))
    assert status == 2
    assert "SLOS_LOG_LEVEL" in errors
    assert "Traceback" not in errors
