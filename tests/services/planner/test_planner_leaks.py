"""A planner whose workers are gone holds no task more than before they came."""

from protos import planner_pb2
from tests.services.planner.planner_messages import a_candidate, a_request, a_state
from tests.tasks import IdleTasks


async def test_nothing_is_left_of_workers_however_they_go(planner) -> None:
    now_us = planner.clock.now_us()
    idle = IdleTasks()
    for number in range(3):
        async with planner.worker(a_state(now_us, requests=[a_request(now_us, f"r{number}")])):
            await planner.admit(a_candidate(now_us, f"c{number}"))
    async with planner.worker(a_state(now_us)) as older:
        replica = planner.fleet.get("gpu-0")
        first = replica.connection
        async with planner.worker(a_state(now_us)):
            await planner.until(lambda: replica.connection > first)
            await older.send(a_state(now_us, 2))  # it learns that a newer stream stands
            await older.refused()
    async with planner.worker() as wrong:
        await wrong.send(planner_pb2.ReplicaState())
        await wrong.refused()
    await idle.returned()
