"""A measurement that is ended early takes down what it started."""

import signal
import subprocess
import sys

SCRIPT = """
import asyncio
from contextlib import asynccontextmanager
from bench.interruptible import run_interruptible

@asynccontextmanager
async def started():
    print("started", flush=True)
    try:
        yield
    finally:
        await asyncio.sleep(0)
        print("stopped", flush=True)

async def work():
    async with started():
        await asyncio.Event().wait()

run_interruptible(work())
"""


def test_sigterm_stops_what_was_started() -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 128 + signal.SIGTERM
