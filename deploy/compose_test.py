"""The containers under test: `make compose-test`. Traffic comes from outside of them, through the published port.

Starts a project of its own beside whatever else runs, kills one of the two worker containers while both are generating,
and compares every token with its definition (the emulated engine's tokens are a hash of prompt and position, so that a
lost or repeated one shows).
"""

import asyncio
import json
import os
import re
import shlex
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from protos import types_pb2
from services.cli.ports import find_free_ports
from tests.e2e.calls import Reply, admission, request
from tests.e2e.test_two_workers import expected

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
COMPOSE_FILE = ROOT / "deploy" / "docker-compose.yml"
COMPOSE = shlex.split(os.environ.get("COMPOSE", "docker compose"))
DOCKER = COMPOSE[0] if COMPOSE[-1] == "compose" else "docker"
SERVICES = {"redis": 1, "planner": 1, "router": 1, "admission": 1, "worker": 2}
COLLECTOR = "otel-collector"
HEALTHY_S = 600.0
OUTPUT_TOKENS = 160
REQUESTS = 24


async def run(*command: str, check: bool = True) -> str:
    """Output of a command; its errors too where it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=ENVIRONMENT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    if check and process.returncode:
        raise AssertionError(f"{shlex.join(command)} ended with {process.returncode}:\n{errors.decode()}{out.decode()}")
    return out.decode()


ENVIRONMENT = dict(os.environ)


@dataclass
class Containers:
    """The running project."""

    project: str
    address: str
    metrics: str
    collector: bool

    async def compose(self, *arguments: str, check: bool = True) -> str:
        return await run(*COMPOSE, "-p", self.project, "-f", str(COMPOSE_FILE), *arguments, check=check)

    async def ids(self, service: str) -> list[str]:
        """Full ids of a service's containers, stopped ones included."""
        label = f"com.docker.compose.service={service}"
        project = f"com.docker.compose.project={self.project}"
        listed = ("ps", "-a", "-q", "--no-trunc", "--filter", f"label={label}", "--filter", f"label={project}")
        return (await run(DOCKER, *listed)).split()

    async def health(self, container: str) -> str:
        """`healthy`, `unhealthy`, `starting`, `running` where it has no check of its own, or why it does not run."""
        state = json.loads(await run(DOCKER, "inspect", "--format", "{{json .State}}", container))
        if state["Status"] != "running":
            return f"{state['Status']}, exit status {state['ExitCode']}"
        return state.get("Health", {}).get("Status", "running")

    async def until_healthy(self, service: str, count: int) -> None:
        """Return once `count` containers of a service are healthy; fails with their logs."""
        deadline_s = time.monotonic() + HEALTHY_S
        while True:
            found = [await self.health(container) for container in await self.ids(service)]
            if sum(status in ("healthy", "running") for status in found) == count:
                return
            if time.monotonic() > deadline_s or any(status.startswith("exited") for status in found):
                logs = await self.compose("logs", "--tail=30", service, check=False)
                raise AssertionError(f"{service}: {found} instead of {count} healthy\n{logs}")
            await asyncio.sleep(1.0)

    async def redis(self, *command: str) -> str:
        [container] = await self.ids("redis")
        return (await run(DOCKER, "exec", container, "redis-cli", *command)).strip()

    async def ready_replicas(self) -> set[str]:
        """Names of the replicas with a live lease that are ready, as their hashes in Redis say."""
        keys = (await self.redis("--scan", "--pattern", "slos:replica:*")).split()
        states = {key.removeprefix("slos:replica:"): await self.redis("HGET", key, "status") for key in keys}
        return {replica for replica, state in states.items() if state == "READY"}

    async def until_ready(self, count: int) -> set[str]:
        async with asyncio.timeout(HEALTHY_S):
            while len(ready := await self.ready_replicas()) != count:  # noqa: ASYNC110 - leases announce nothing
                await asyncio.sleep(0.2)
        return ready


async def collector_image() -> bool:
    """Whether the collector's image is here or can be pulled; everything else is built from the project."""
    image = re.search(r"image: \$\{SLOS_OTEL_IMAGE:-(.+)\}", COMPOSE_FILE.read_text(encoding="utf-8"))
    assert image is not None
    name = ENVIRONMENT.get("SLOS_OTEL_IMAGE", image[1])
    if await run(DOCKER, "images", "--quiet", name):
        return True
    return bool(await run(DOCKER, "pull", "--quiet", name, check=False))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def containers() -> AsyncIterator[Containers]:
    port, metrics_port = find_free_ports(2)
    collector = await collector_image()
    ENVIRONMENT.update(
        SLOS_PORT=str(port),
        SLOS_METRICS_PORT=str(metrics_port),
        OTEL_METRIC_EXPORT_INTERVAL="1000",
        SLOS_ENGINE="emulated",
        SLOS_ORDER="round-robin",  # both workers are to have work; the default fills one first
        **({} if collector else {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}),
    )
    metrics = f"http://127.0.0.1:{metrics_port}/metrics"
    project = Containers(f"slos-test-{os.getpid()}", f"127.0.0.1:{port}", metrics, collector)
    try:
        await project.compose("up", "--detach", "--no-build", *SERVICES, *([COLLECTOR] if collector else []))
        for service, count in SERVICES.items():
            await project.until_healthy(service, count)
        await project.until_ready(2)
        yield project
    finally:
        await project.compose("down", "--volumes", "--timeout", "20")


@dataclass
class Call:
    """One request under way; `begun` once it has tokens."""

    reply: Reply
    begun: asyncio.Event
    task: "asyncio.Task[None]"


def send(stub: object, message: object) -> Call:
    reply, begun = Reply(), asyncio.Event()

    async def collect() -> None:
        async for event in stub.Generate(message, timeout=300):  # type: ignore[attr-defined]
            reply.take(event)  # fails on a gap or a repetition
            if reply.ids:
                begun.set()

    return Call(reply, begun, asyncio.create_task(collect()))


def patient(salt: int) -> object:
    stage = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=20_000, tpot_ms=100)
    return request("", 900, OUTPUT_TOKENS, salt=salt, stages=[stage])


async def test_nothing_runs_as_root_and_every_service_is_healthy(containers: Containers) -> None:
    for service, count in SERVICES.items():
        ids = await containers.ids(service)
        assert len(ids) == count
        for container in ids:
            assert await containers.health(container) in ("healthy", "running")
    for service in ("planner", "router", "admission", "worker", "redis"):
        for container in await containers.ids(service):
            assert (await run(DOCKER, "exec", container, "id", "-u")).strip() != "0", service


async def test_a_killed_worker_container_loses_and_repeats_nothing(containers: Containers) -> None:
    async with admission(containers.address) as stub:
        messages = [patient(400 + n) for n in range(REQUESTS)]
        calls = [send(stub, message) for message in messages]
        await asyncio.wait_for(asyncio.gather(*(call.begun.wait() for call in calls)), 120)
        running = {call.reply.verdicts[-1].replica_id for call in calls}
        assert len(running) == 2, "one worker has all the load"
        victim_id = max(running, key=lambda replica: sum(c.reply.verdicts[-1].replica_id == replica for c in calls))
        [victim] = [c for c in await containers.ids("worker") if c.startswith(victim_id)]
        unfinished = [call for call in calls if not call.task.done()]
        assert unfinished, "the load ended before the kill"
        await run(DOCKER, "kill", "--signal", "KILL", victim)
        await asyncio.wait_for(asyncio.gather(*(call.task for call in calls)), 240)
    moved = 0
    for message, call in zip(messages, calls, strict=True):
        finished = call.reply.finished
        assert finished is not None
        assert call.reply.ids == expected(message, OUTPUT_TOKENS)
        moved += finished.attempts > 1
        assert finished.attempts == 1 or finished.replica_id != victim_id
    assert moved > 0, "no request was on the killed worker"
    tokens = len(calls) * OUTPUT_TOKENS
    print(f"\n{len(calls)} requests, {tokens} tokens: lost 0, repeated 0; {moved} moved from {victim_id}")


async def test_the_queues_are_empty_afterwards_and_the_worker_comes_back(containers: Containers) -> None:
    [dead] = [c for c in await containers.ids("worker") if await containers.health(c) != "healthy"]
    await run(DOCKER, "start", dead)
    await containers.until_healthy("worker", 2)
    assert dead[:12] in await containers.until_ready(2)
    streams = (await containers.redis("--scan", "--pattern", "slos:q:*")).split()
    assert streams
    assert {stream: await containers.redis("XLEN", stream) for stream in streams} == dict.fromkeys(streams, "0")
    assert await containers.redis("EXISTS", "slos:dead") == "0"
    async with admission(containers.address) as stub:
        calls = [send(stub, patient(500 + n)) for n in range(REQUESTS)]
        await asyncio.wait_for(asyncio.gather(*(call.task for call in calls)), 240)
    assert all(call.reply.finished is not None for call in calls)


async def test_entries_survive_a_killed_redis(containers: Containers) -> None:
    await containers.redis("SET", "compose-test", "kept")
    await asyncio.sleep(1.5)  # the append-only file is synced every second: that is what is promised
    [redis] = await containers.ids("redis")
    await run(DOCKER, "kill", "--signal", "KILL", redis)
    await run(DOCKER, "start", redis)
    await containers.until_healthy("redis", 1)
    assert await containers.redis("GET", "compose-test") == "kept"
    await containers.until_ready(2)
    async with admission(containers.address) as stub:
        call = send(stub, patient(600))
        await asyncio.wait_for(call.task, 120)
    assert call.reply.ids == expected(patient(600), OUTPUT_TOKENS)


async def test_the_collector_has_metrics_of_every_service(containers: Containers) -> None:
    if not containers.collector:
        pytest.skip("the collector's image is not here and cannot be pulled")
    fetch = ("curl", "-sf", containers.metrics)
    wanted = ("gen_ai_server_time_to_first_token", "slos_serve_plan_duration", "slos_serve_queue")
    async with asyncio.timeout(60):
        while missing := [name for name in wanted if name not in await run(*fetch, check=False)]:  # noqa: ASYNC110
            await asyncio.sleep(1.0)
    assert not missing


async def test_no_secret_of_the_build_is_in_an_image() -> None:
    for image in ("slos-serve-control", "slos-serve-worker", "slos-serve-redis"):
        command = 'test ! -e /etc/pip.conf && test -z "$(ls -A /run/secrets 2>/dev/null)"'
        await run(DOCKER, "run", "--rm", "--entrypoint", "sh", image, "-c", command)
