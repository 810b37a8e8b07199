"""The stream of tokens from one worker."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from protos import worker_pb2
from services.admission.worker_link import WorkerLink
from services.common.clock import Clock
from services.common.kept import KeptTasks
from tests.services.admission.world import World, soon


@asynccontextmanager
async def linked(world: World, on_chunks: Callable[[list[str]], None], clock: Clock) -> AsyncIterator[None]:
    """A link of its own to the world's worker; `on_chunks` gets the request ids of each part."""
    [replica] = world.admission.replicas.values()
    link = WorkerLink(
        replica,
        "another",
        clock,
        KeptTasks(),
        on_chunks=lambda _, chunks: on_chunks([chunk.request_id for chunk in chunks]),
        on_linked=lambda: None,
        on_broken=lambda: None,
        on_skew=lambda _: None,
    )
    yield
    await link.close()


def step_of(world: World, requests: int) -> None:
    """One step of the engine, with a token for each request."""
    for number in range(requests):
        world.worker.channel("another").put_nowait(worker_pb2.TokenChunk(request_id=f"r{number}", attempt=1))


async def test_the_chunks_of_a_large_step_are_handed_on_in_order_and_in_parts(world: World) -> None:
    parts: list[list[str]] = []
    step_of(world, 70)
    async with linked(world, parts.append, Clock(lambda: 0.0)):
        await soon(lambda: sum(map(len, parts)) == 70)
    assert [len(part) for part in parts] == [16, 16, 16, 16, 6]
    assert [request_id for part in parts for request_id in part] == [f"r{number}" for number in range(70)]


async def test_more_are_handed_on_in_a_turn_while_the_others_need_long_turns(world: World) -> None:
    now_s, turn = 0.0, 0
    parts_in: dict[int, int] = {}

    def hand_on(_: list[str]) -> None:
        nonlocal now_s
        now_s += 1 / 1024
        parts_in[turn] = parts_in.get(turn, 0) + 1

    async def others() -> None:
        nonlocal now_s, turn
        while True:
            turn += 1
            now_s += 15 / 1024
            await asyncio.sleep(0)

    busy = asyncio.create_task(others())
    step_of(world, 12 * 16)
    async with linked(world, hand_on, Clock(lambda: now_s)):
        await soon(lambda: sum(parts_in.values()) == 12)
    busy.cancel()
    assert list(parts_in.values()) == [1, 4, 5, 2]  # a quarter of 16 parts' time, then of 19
