"""Clocks that step under a worker, through its clock object."""

import time
from pathlib import Path

from redis.asyncio import Redis

from protos import types_pb2
from services.common.clock import Clock
from services.common.request_record import RequestState
from tests.services.worker.worker_world import eventually, running_world


class Hands:
    """Both clocks of a machine, moved by hand on top of the real ones."""

    def __init__(self) -> None:
        self.wall_s = self.monotonic_s = 0.0
        self.clock = Clock(lambda: time.monotonic() + self.monotonic_s, lambda: time.time() + self.wall_s)


async def test_a_stepped_wall_clock_moves_no_deadline(
    redis: Redis, redis_url: str, unique: str, tmp_path: Path
) -> None:
    hands = Hands()
    async with running_world(redis, redis_url, unique, tmp_path, clock=hands.clock) as world:
        request = world.request(unique, client_deadline_us=world.clock.now_us() + 30_000_000)
        for step_s in (3600.0, -7200.0):
            hands.wall_s += step_s
        await world.submit(request)
        await world.engine.until_running(unique)
        deadline_s = world.engine.running[unique].submission.ttft_deadline_s
        assert 0 < deadline_s - world.clock.now_s() <= 5.0
        world.engine.step(3)
        end = await world.listener.end(unique)
        assert end.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_a_machine_that_slept_claims_nothing_until_its_lease_is_proved(
    redis: Redis, redis_url: str, unique: str, tmp_path: Path
) -> None:
    hands = Hands()
    async with running_world(redis, redis_url, unique, tmp_path, clock=hands.clock) as world:
        await world.submit(world.request(unique, max_tokens=50))
        await world.engine.until_running(unique)
        world.engine.step()
        await world.until_recorded(unique, state="running")
        await redis.delete(f"slos:replica:{world.settings.replica_id}")
        hands.monotonic_s += 10.0
        assert not world.worker.lease_held
        await world.until_lease(status="READY")
        await eventually(lambda: world.worker.lease_held)
        assert unique in world.engine.running  # nobody took it meanwhile
        assert (await world.record(unique)).state is RequestState.RUNNING
        world.engine.step(2)
        assert await world.listener.tokens(unique, 3) == [1000, 1001, 1002]
