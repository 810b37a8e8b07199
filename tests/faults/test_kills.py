"""Services killed under load: every request is answered, no token is lost or comes twice, nothing is left behind."""

import asyncio
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio

from bench.fault_load import Answer, FaultLoad, Shape
from bench.fault_state import runs_twice
from services.cli.stack import LocalStack
from services.client import Reason, SlosClient
from services.common.dead_letters import read_dead_letters
from services.common.request_store import RequestStore
from tests.faults.waiting import nothing_left, until, wrong

pytestmark = [pytest.mark.faults, pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(400)]

ALL_REPLICAS = 3
LOAD = Shape(rate_rps=5.0, output_tokens=(60, 160), on_infeasible=("BEST_EFFORT",))
RESUMED_S = 2.0  # first resumed token after a worker's death, another replica being free


@pytest_asyncio.fixture(autouse=True, loop_scope="package")
async def whole_again(fleet: LocalStack) -> AsyncIterator[None]:
    """A test that failed leaves nobody dead for the next one."""
    yield
    dead = [name for name in fleet.process_names if name != "redis" and not fleet.process(name).running]
    ends = [fleet.process(name).describe_end() for name in dead]
    await asyncio.gather(*(fleet.restart(name) for name in dead))
    assert not ends, "\n".join(ends)


async def under_load(stack: LocalStack, fault: Callable[[str], Awaitable[None]], shape: Shape = LOAD) -> list[Answer]:
    """Answers to a few seconds of load in the middle of which something happens, told which worker is the busiest.

    A light load stays on few replicas: the router fills one before the next.
    """
    load = FaultLoad(stack.addresses.admission, shape, name=uuid.uuid4().hex[:8])
    running = asyncio.create_task(load.run(5.0))

    await until(lambda: sum(bool(answer.ids) and not answer.done for answer in load.answers) >= 3)
    await fault(busiest(load.answers))
    await running
    assert len(load.answers) > 5
    return load.answers


def busiest(answers: list[Answer]) -> str:
    """The worker that most unfinished answers come from."""
    at = Counter(a.verdict.replica_id for a in answers if a.verdict is not None and a.ids and not a.done)
    return at.most_common(1)[0][0].replace("w", "worker-")


async def test_a_killed_worker_costs_a_short_pause(fleet: LocalStack) -> None:
    killed: list[str] = []

    async def kill(worker: str) -> None:
        killed.append(worker)
        await fleet.kill(worker)

    answers = await under_load(fleet, kill)
    assert not wrong(answers)
    moved = [answer for answer in answers if answer.finished is not None and answer.finished.attempts > 1]
    assert moved
    await fleet.restart(*killed)
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=60)
    assert (await nothing_left(fleet)).none
    assert max(answer.longest_pause_s for answer in moved) < RESUMED_S


async def test_a_killed_engine_takes_its_worker_along_and_nothing_else(fleet: LocalStack) -> None:
    killed: list[str] = []

    async def kill(worker: str) -> None:
        killed.append(worker)
        fleet.kill_engine(worker)
        await fleet.process(worker).wait_ended()

    answers = await under_load(fleet, kill)
    assert not wrong(answers)
    await fleet.restart(*killed)
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=60)
    assert (await nothing_left(fleet)).none


async def test_a_worker_that_wakes_after_its_lease_aborts_what_is_anothers(fleet: LocalStack) -> None:
    async def oversleep(worker: str) -> None:
        fleet.pause(worker)
        try:
            await fleet.wait_for_replicas(ALL_REPLICAS - 1, timeout_s=30)
            await asyncio.sleep(1.5)  # let the others take over what it held
        finally:
            fleet.go_on(worker)

    answers = await under_load(fleet, oversleep)
    assert not wrong(answers)
    assert any(answer.finished is not None and answer.finished.attempts > 1 for answer in answers)
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=60)
    assert (await nothing_left(fleet)).none
    assert runs_twice(fleet.spec.data_dir) == 0


async def test_admission_and_worker_of_a_request_may_both_die(fleet: LocalStack) -> None:
    killed: list[str] = []

    async def kill_both(worker: str) -> None:
        killed.append(worker)
        await asyncio.gather(fleet.kill("admission-0"), fleet.kill(worker))

    answers = await under_load(fleet, kill_both)
    # who had no verdict yet has nothing to resume: an error says so
    unheard = [answer for answer in answers if answer.error is not None and answer.verdict is None]
    assert all(one.error.reason is Reason.ADMISSION_UNAVAILABLE for one in unheard if one.error)
    assert not wrong([answer for answer in answers if answer not in unheard])
    await asyncio.gather(fleet.restart(*killed), fleet.restart("admission-0"))
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=60)
    assert (await nothing_left(fleet)).none


async def test_the_router_takes_over_what_lost_admission_and_worker_and_drops_it_after_its_grace(
    fleet: LocalStack,
) -> None:
    client = redis.asyncio.from_url(fleet.redis_url)
    store, load = (
        RequestStore(client),
        FaultLoad(fleet.addresses.admission[:1], replace(LOAD, resume_grace_s=2.0), name=uuid.uuid4().hex[:8]),
    )
    async with SlosClient(fleet.addresses.admission[0]) as one:
        answer = load.send(one, wanted=1500)
        await until(lambda: bool(answer.ids))
        record = await store.get(answer.request_id)
        assert record is not None
        worker = record.replica_id.replace("w", "worker-")
        await asyncio.gather(fleet.kill("admission-0"), fleet.kill(worker))

        async def cancelled() -> bool:
            now = await store.get(answer.request_id)
            return now is not None and now.state.value == "cancelled"

        await until(cancelled)
    await client.aclose()
    await asyncio.gather(fleet.restart(worker), fleet.restart("admission-0"))
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=60)
    assert (await nothing_left(fleet)).none


async def test_killed_planner_and_router_cost_no_request(fleet: LocalStack) -> None:
    async def kill(_: str) -> None:
        await asyncio.gather(fleet.kill("planner-0"), fleet.kill("router-0"))

    answers = await under_load(fleet, kill)
    assert not wrong(answers)
    await asyncio.gather(fleet.restart("planner-0"), fleet.restart("router-0"))
    assert (await nothing_left(fleet)).none


async def test_a_killed_redis_stops_only_what_is_new(fleet: LocalStack) -> None:
    async def outage(_: str) -> None:
        await fleet.kill("redis")
        await asyncio.sleep(5.5)  # everything that is done now and then falls into it, such as refreshing queue entries
        await fleet.restart("redis")

    answers = await under_load(fleet, outage)
    refused = [answer for answer in answers if answer.error is not None and not answer.ids]
    assert all(one.error.code.name == "UNAVAILABLE" for one in refused if one.error)
    assert not wrong([answer for answer in answers if answer not in refused])
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=60)
    assert (await nothing_left(fleet)).none
    assert runs_twice(fleet.spec.data_dir) == 0


async def test_a_request_that_kills_its_workers_becomes_a_dead_letter_that_can_be_sent_again(
    fleet: LocalStack,
) -> None:
    client = redis.asyncio.from_url(fleet.redis_url)
    store = RequestStore(client)
    load = FaultLoad(fleet.addresses.admission[:1], LOAD, name=uuid.uuid4().hex[:8])
    async with SlosClient(fleet.addresses.admission[0]) as one:
        poison = load.send(one, wanted=1000)
        for attempt in (1, 2, 3):

            async def runs(attempt: int = attempt) -> bool:
                now = await store.get(poison.request_id)
                return now is not None and now.attempt == attempt and now.state.value == "running"

            await until(runs)
            record = await store.get(poison.request_id)
            assert record is not None
            fleet.kill_engine(record.replica_id.replace("w", "worker-"))
        await until(lambda: poison.done)
    assert poison.error is not None
    assert (poison.error.reason, poison.right_so_far) == (Reason.ENGINE_FAILED, True)
    assert "took 3 workers along" in poison.error.text
    [letter] = [one for one in await read_dead_letters(client) if one.request_id == poison.request_id]
    await asyncio.gather(*(fleet.restart(f"worker-{number}") for number in range(ALL_REPLICAS)))
    await fleet.wait_for_replicas(ALL_REPLICAS, timeout_s=90)
    listed = await slosctl(fleet, "dead", "list")
    assert letter.letter_id in listed
    await slosctl(fleet, "dead", "redrive", letter.letter_id)
    assert letter.letter_id not in {one.letter_id for one in await read_dead_letters(client)}
    await client.aclose()
    assert (await nothing_left(fleet)).none


async def slosctl(stack: LocalStack, *words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *words, "--data-dir", str(stack.spec.data_dir)),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()
