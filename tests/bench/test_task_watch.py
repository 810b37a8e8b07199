"""Tasks that a process leaves behind are seen from outside, by what they run."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from bench import task_watch
from bench.fault_state import Leftovers
from bench.task_watch import TaskWatch
from services.cli.service_process import ServiceFailedError

PROCESS = """
import asyncio, sys
from pathlib import Path
from services.common.telemetry import start_telemetry

async def forgotten():
    await asyncio.Event().wait()

async def brief():
    await asyncio.sleep(0.2)

async def main():
    telemetry = start_telemetry("test", "t", Path(sys.argv[1]))
    reader, tasks = asyncio.StreamReader(), []
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := (await reader.readline()).decode().strip():
        if line == "leak":
            tasks += [asyncio.create_task(forgotten()) for _ in range(2)]
        elif line == "work":
            tasks += [asyncio.create_task(brief()) for _ in range(5)]
        else:
            for task in tasks:
                task.cancel()
    telemetry.shutdown()

asyncio.run(main())
"""


async def test_a_process_is_asked_for_its_tasks(tmp_path: Path) -> None:
    async with TaskWatch(["thing-0"]) as watch:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROCESS, str(tmp_path)),
            env={**os.environ, **watch.environments["thing-0"]},
            stdin=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        await watch.learn_idle()
        assert await watch.surplus() == {}
        process.stdin.write(b"leak\nwork\n")
        async with asyncio.timeout(20):
            while not (left := await watch.surplus()):
                pass
        assert left == {"thing-0: forgotten": 2}
        assert not Leftovers(0, 0, 0, 0, 0, left).none
        process.stdin.write(b"tidy\n")
        async with asyncio.timeout(20):
            while await watch.surplus():
                pass
        process.stdin.close()
        assert await process.wait() == 0


async def test_a_process_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_watch, "_SILENT_S", 0.1)
    async with TaskWatch(["thing-0"]) as watch:
        with pytest.raises(ServiceFailedError, match="thing-0"):
            await watch.surplus()
