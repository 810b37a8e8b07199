"""A worker that has nothing to do holds no task more than before its first request, however requests ended."""

import asyncio

import grpc.aio

from protos import worker_pb2
from tests.services.worker.worker_world import World, eventually
from tests.tasks import IdleTasks


async def test_nothing_is_left_of_requests_however_they_end(world: World, unique: str) -> None:
    idle = IdleTasks()
    ends = ("length", "cancelled", "stopped", "failed", "stolen", "late")
    ids = {end: f"{unique}-{end}" for end in ends}
    requests = {end: world.request(ids[end], max_tokens=4) for end in ends}
    for request in requests.values():
        await world.submit(request)
    await world.engine.until_running(*ids.values())
    world.engine.step()
    for request_id in ids.values():
        await world.listener.tokens(request_id, 1)
    for end, reason in (("cancelled", "the client is gone"), ("stopped", "stop")):
        await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id=ids[end], attempt=1, reason=reason))
    world.engine.fail(ids["failed"], RuntimeError("no such kernel"))
    requests["stolen"].attempt = 2
    await world.steal(requests["stolen"], "slos:q:nobody:loose")
    await world.worker._verify()  # as after a lost lease
    for end in ("cancelled", "stopped", "failed", "stolen"):
        await world.engine.until_gone(ids[end])
    world.engine.step(3)
    await world.listener.end(ids["length"])
    await world.listener.end(ids["late"])
    await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id=ids["late"], attempt=1, reason="too late"))
    await idle.returned()
    assert not world.engine.running
    await eventually(lambda: not world.worker._generations)  # it hears of an ended task a turn later


async def test_nothing_is_left_of_admission_processes_that_went(world: World, unique: str) -> None:
    idle = IdleTasks()
    calls = []
    for number in (1, 1, 2):  # one after the other: which of two is newer is up to the server
        calls.append(world.stub.Subscribe(worker_pb2.SubscribeRequest(admission_id=f"{unique}-{number}")))
        await calls[-1].read()
    async with asyncio.timeout(10):
        assert await calls[0].read() is grpc.aio.EOF  # a newer one of the same process stands
    request = world.request(unique, admission_id=f"{unique}-2")
    await world.submit(request)
    await world.engine.until_running(unique)
    world.engine.step()
    await calls[2].read()
    for call in calls:
        call.cancel()
    await world.engine.abort(unique)
    await world.engine.until_gone(unique)
    await idle.returned()
