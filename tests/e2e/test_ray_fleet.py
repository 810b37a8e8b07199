"""Workers as Ray actors, for real: a local Ray, emulated engines, killed processes, declined requests."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import redis.asyncio

from protos import admission_pb2, types_pb2
from services.cli.stack import LocalStack
from services.cli.stack_spec import BUNDLED_MODEL, CATALOGUE, StackSpec
from services.common.registry import ReplicaWatcher
from services.worker.fleet.actor import WorkerActor
from tests.e2e.calls import Reply, generate, request
from tests.e2e.test_two_workers import expected

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START_S = 240.0
ADMITTED = types_pb2.VERDICT_KIND_ADMITTED


class FleetProcess:
    """`python -m services.worker.fleet`, what it says, and its replicas as Redis knows them."""

    def __init__(self, process: asyncio.subprocess.Process, redis_url: str) -> None:
        self.process = process
        self.lines: list[str] = []
        self._redis = redis.asyncio.from_url(redis_url)
        self._watcher = ReplicaWatcher(self._redis)
        self._reader = asyncio.create_task(self._read())
        self._news = asyncio.Event()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode(errors="replace").rstrip())
            self._news.set()

    async def says(self, text: str, within_s: float = START_S) -> None:
        """Wait for a line."""
        async with asyncio.timeout(within_s):
            while not any(text in line for line in self.lines):
                self._news.clear()
                await self._news.wait()

    async def ready(self, replica_ids: set[str], *, since_us: int = 0) -> dict[str, int]:
        """Wait until exactly these replicas serve, started after `since_us`; when each was started."""
        async with asyncio.timeout(START_S):
            while True:
                await self._watcher.refresh()
                leases = self._watcher.replicas
                serving = {name: lease.started_us for name, lease in leases.items() if lease.status == 1}
                if serving.keys() == replica_ids == leases.keys() and max(serving.values()) > since_us:
                    return serving
                if self.process.returncode is not None:
                    raise AssertionError("\n".join(self.lines[-40:]))
                await asyncio.sleep(0.1)

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(self.process.wait(), 180)
        await self._reader
        await self._redis.aclose()
        return status

    def actor_process(self, replica_id: str) -> psutil.Process:
        """The process that Ray runs a replica's actor in: it listens where the lease says."""
        port = int(self._watcher.replicas[replica_id].address.rpartition(":")[2])
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                ports = {connection.laddr.port for connection in process.net_connections() if connection.laddr}
                if port in ports and WorkerActor.__name__ in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"no actor process of {replica_id}")


@asynccontextmanager
async def fleet(stack: LocalStack, *options: str, **settings: str) -> AsyncIterator[FleetProcess]:
    environment = {
        **os.environ,
        "SLOS_REDIS_URL": stack.redis_url,
        "SLOS_PLANNERS": ",".join(stack.addresses.planner),
        "SLOS_CATALOGUE": str(CATALOGUE),
        "SLOS_DATA_DIR": str(stack.spec.data_dir),
        "SLOS_MODEL": str(BUNDLED_MODEL),
        "SLOS_ENGINE": "emulated",
        "SLOS_PRESET": "opt-6.7b-a100",
        "PYTHONUNBUFFERED": "1",
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.worker.fleet", "--cpus", "0.25", *options),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    running = FleetProcess(process, stack.redis_url)
    children: list[psutil.Process] = []
    try:
        yield running
        children = psutil.Process(process.pid).children(recursive=True)
        assert await running.stop() == 0
    finally:
        if process.returncode is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            await process.wait()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()


@asynccontextmanager
async def services(data_dir: Path) -> AsyncIterator[LocalStack]:
    """Everything but the workers."""
    async with LocalStack(StackSpec(data_dir=data_dir, engine="emulated", num_workers=0)) as stack:
        yield stack


async def served(stack: LocalStack, message: admission_pb2.GenerateRequest) -> Reply:
    reply = await generate(stack.admission_address, message, timeout_s=120)
    assert reply.ids == expected(message, message.sampling.max_tokens)
    return reply


@pytest.mark.timeout(900)
async def test_a_killed_actor_is_started_again_and_its_requests_go_on(tmp_path: Path) -> None:
    async with services(tmp_path) as stack, fleet(stack, "--replicas", "2") as workers:
        before = await workers.ready({"ray-0", "ray-1"})
        await stack.wait_for_replicas(2, timeout_s=30)
        running = [asyncio.create_task(served(stack, request("chatbot", 200 + i, 150, salt=i))) for i in range(12)]
        done, _ = await asyncio.wait(running, timeout=1.5)
        assert not done
        workers.actor_process("ray-0").kill()
        replies = await asyncio.gather(*running)  # every token, once
        assert {reply.finished.replica_id for reply in replies} <= {"ray-0", "ray-1"}
        after = await workers.ready({"ray-0", "ray-1"}, since_us=max(before.values()))
        assert after["ray-0"] > before["ray-0"]
        assert after["ray-1"] == before["ray-1"]
        again = await asyncio.gather(*(served(stack, request("chatbot", 1500 + i, 20, salt=50 + i)) for i in range(24)))
        assert {reply.finished.replica_id for reply in again} == {"ray-0", "ray-1"}


@pytest.mark.timeout(900)
async def test_declines_scale_out_and_idleness_drains_and_scales_in(tmp_path: Path) -> None:
    hysteresis = {
        "SLOS_SCALE_OUT_AFTER_S": "2",
        "SLOS_SCALE_IN_AFTER_S": "6",
        "SLOS_SCALE_WINDOW_S": "3",
        "SLOS_SCALE_SPARE_IDLE": "1.0",
    }
    options = ("--replicas", "1", "--min", "1", "--max", "2")
    async with services(tmp_path) as stack, fleet(stack, *options, **hysteresis) as workers:
        await workers.ready({"ray-0"})
        await stack.wait_for_replicas(1, timeout_s=30)
        flood = asyncio.create_task(offered_until(stack, workers, "1 -> 2 replicas"))
        await workers.says("1 -> 2 replicas")
        replies = await flood
        assert any(reply.verdict.kind != ADMITTED for reply in replies)
        await workers.ready({"ray-0", "ray-1"})

        # a long request keeps its replica from ending, not from being drained
        last = asyncio.create_task(served(stack, request("chatbot", 100, 400, salt=900)))
        await workers.says("2 -> 1 replicas")
        await last
        await workers.says("ended ray-")
        [kept] = {"ray-0", "ray-1"} - {line.split()[-1] for line in workers.lines if "fleet: ended" in line}
        await workers.ready({kept})
        assert (await served(stack, request("chatbot", 90, 8, salt=901))).finished.replica_id == kept


async def offered_until(stack: LocalStack, workers: FleetProcess, text: str) -> list[Reply]:
    """More than one emulated A100 can promise, until the fleet says that it grows."""
    calls: list[asyncio.Task[Reply]] = []
    while not any(text in line for line in workers.lines):
        message = request("summarizer", 3000, 30, salt=len(calls))
        calls.append(asyncio.create_task(generate(stack.admission_address, message, timeout_s=200)))
        await asyncio.sleep(0.1)
        assert len(calls) < 600, "the fleet does not grow"
    return await asyncio.gather(*calls)
