"""A worker's own life: lease, drain, loss of the engine, of the lease, of its planner."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from protos import planner_pb2, types_pb2, worker_pb2
from services.common.errors import Reason, SloServeError
from services.common.keys import BEST_EFFORT_QUEUE
from services.common.request_record import RequestState
from services.common.rpc import open_channel
from tests.services.worker.worker_world import World, eventually, running_world


async def test_the_lease_describes_the_replica(world: World) -> None:
    lease = await world.lease()
    assert (lease["status"], lease["model"], lease["engine"]) == ("READY", "scripted", "vllm")
    assert lease["address"] == f"127.0.0.1:{world.worker.port}"
    assert (lease["total_blocks"], lease["block_size"], lease["max_num_seqs"]) == ("100", "16", "32")
    assert lease["planner"] == world.settings.planners[0]
    assert 0 < await world.redis.pttl(f"slos:replica:{world.settings.replica_id}") <= 3000


async def test_the_lease_carries_the_load(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.free_blocks = 42
    world.engine.step()
    assert (await world.until_lease(free_blocks="42"))["running"] == "1"


async def test_a_drain_finishes_what_runs_and_leaves_the_fleet(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.step()
    await world.listener.tokens(unique, 1)
    world.stop.set()
    await world.until_lease(status="DRAINING")
    async with open_channel(f"127.0.0.1:{world.worker.port}", traced=False) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert not world.serving.done()
    world.engine.step(2)
    assert (await world.listener.end(unique)).finish_reason == types_pb2.FINISH_REASON_LENGTH
    await asyncio.wait_for(world.serving, 5)
    await world.worker.stop()
    assert await world.lease() == {}
    assert world.engine.stopped


async def test_a_drain_takes_what_was_promised_here_but_no_best_effort(world: World, unique: str) -> None:
    first, promised, free = unique, f"{unique}-p", f"{unique}-b"
    await world.submit(world.request(first))
    await world.engine.until_running(first)
    world.engine.free_blocks = 0
    world.engine.step()
    await world.listener.tokens(first, 1)
    await world.submit(world.request(free, promised=False, tier="best-effort"))
    world.stop.set()
    await world.submit(world.request(promised))
    await world.engine.until_running(promised)
    world.engine.step(3)
    await asyncio.wait_for(world.serving, 5)
    assert (await world.record(promised)).state is RequestState.FINISHED
    assert (await world.record(free)).state is RequestState.QUEUED
    await world.store.cancel(free)


async def test_a_drain_hands_unstarted_best_effort_back_as_the_next_attempt(world: World, unique: str) -> None:
    world.engine.hold_back.add(unique)
    await world.submit(world.request(unique, promised=False, tier="best-effort"))
    await world.engine.until_running(unique)
    world.stop.set()
    await asyncio.wait_for(world.serving, 5)
    record = await world.record(unique)
    assert (record.state, record.attempt, record.stream) == (RequestState.QUEUED, 2, BEST_EFFORT_QUEUE)
    again = await world.store.queued_request(record)
    assert again is not None
    assert (again.attempt, list(again.delivered_token_ids), again.promised) == (2, [], False)
    assert unique not in world.listener.ended
    await world.store.cancel(unique)


async def test_what_outlasts_the_grace_is_left_for_another_attempt(world: World, unique: str) -> None:
    await world.submit(world.request(unique, max_tokens=100))
    await world.engine.until_running(unique)
    world.engine.step()
    await world.listener.tokens(unique, 1)
    await world.until_recorded(unique, state="running")
    answer = await world.stub.Drain(worker_pb2.DrainRequest(grace_s=0.3))
    assert answer.unfinished == 1
    await asyncio.wait_for(world.serving, 5)
    assert unique not in world.listener.ended
    record = await world.record(unique)
    assert (record.state, record.attempt) == (RequestState.RUNNING, 1)
    assert await world.store.queued_request(record) is not None  # to be placed again from
    await world.store.cancel(unique)


async def test_a_dead_engine_ends_the_worker_and_no_request(world: World, unique: str) -> None:
    await world.submit(world.request(unique, max_tokens=100))
    await world.engine.until_running(unique)
    world.engine.step()
    await world.until_recorded(unique, state="running")
    world.engine.die()
    with pytest.raises(SloServeError) as lost:
        await asyncio.wait_for(world.serving, 5)
    assert lost.value.reason is Reason.ENGINE_FAILED
    await world.worker.stop()
    assert await world.lease() == {}
    assert unique not in world.listener.ended
    assert (await world.record(unique)).state is RequestState.RUNNING
    await world.store.cancel(unique)


async def test_a_lost_lease_costs_only_what_has_been_placed_elsewhere(world: World, unique: str) -> None:
    mine, moved = unique, f"{unique}-m"
    for request_id in (mine, moved):
        await world.submit(world.request(request_id, max_tokens=100))
    await world.engine.until_running(mine, moved)
    await world.steal(world.request(moved, attempt=2), f"slos:q:elsewhere-{unique}:loose")
    await world.redis.delete(f"slos:replica:{world.settings.replica_id}")
    await world.engine.until_gone(moved)
    assert mine in world.engine.running
    await world.until_lease(status="READY")
    assert moved not in world.listener.ended
    assert (await world.record(moved)).state is RequestState.QUEUED


async def test_a_newer_worker_of_the_same_name_ends_this_one(world: World, unique: str) -> None:
    key = f"slos:replica:{world.settings.replica_id}"
    await world.redis.hset(key, "started_us", world.clock.now_us())
    with pytest.raises(SloServeError, match="another worker has taken the name"):
        await asyncio.wait_for(world.serving, 5)
    await world.worker.stop()
    assert await world.redis.exists(key)  # the newer one's lease stays


async def test_a_long_generation_never_looks_idle(redis: Redis, redis_url: str, unique: str, tmp_path: Path) -> None:
    async with running_world(redis, redis_url, unique, tmp_path) as world:
        await world.submit(world.request(unique, max_tokens=100))
        await world.engine.until_running(unique)
        (entry,) = await world.pending(world.queue("loose"))
        await asyncio.sleep(0)
        async with asyncio.timeout(15):
            idle_ms = entry["time_since_delivered"]
            while True:
                (entry,) = await world.pending(world.queue("loose"))
                if entry["time_since_delivered"] < idle_ms:  # it went down: refreshed
                    break
                idle_ms = entry["time_since_delivered"]
                await asyncio.sleep(0.1)
        assert entry["times_delivered"] == 1


async def test_every_connection_to_the_planner_begins_with_everything(world: World, unique: str) -> None:
    await world.submit(world.request(unique, max_tokens=50))
    await world.engine.until_running(unique)
    world.engine.step()
    await eventually(lambda: any(state.requests for state in world.planner.states))
    first = world.planner.states[0]
    assert (first.full, first.replica_id, first.total_blocks) == (True, world.settings.replica_id, 100)
    assert first.perf_model.segments[0].b == 0.01

    world.planner.states.clear()
    world.planner.tell(None)
    await eventually(lambda: world.planner.connections == 2 and world.planner.states)
    again = world.planner.states[0]
    assert again.full
    assert [request.request_id for request in again.requests] == [unique]
    assert again.seq > first.seq


async def test_states_are_numbered_without_a_gap_and_carry_finished_lengths(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.step(3)
    await eventually(lambda: any(state.finished for state in world.planner.states))
    (length,) = next(state.finished for state in world.planner.states if state.finished)
    assert (length.request_id, length.application, length.prompt_tokens, length.output_tokens) == (
        unique,
        "chatbot",
        4,
        3,
    )
    assert (length.promised, length.met, length.missed) == (True, True, "")
    numbers = [state.seq for state in world.planner.states]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_a_snapshot_comes_when_it_is_asked_for(world: World) -> None:
    await eventually(lambda: world.planner.states)
    count = sum(state.full for state in world.planner.states)
    world.planner.tell(planner_pb2.Directive(seq=1, send_snapshot=planner_pb2.SendSnapshot()))
    await eventually(lambda: sum(state.full for state in world.planner.states) == count + 1)


async def test_a_promotion_reaches_engine_client_and_record(world: World, unique: str) -> None:
    await world.submit(world.request(unique, promised=False, tier="best-effort"))
    await world.engine.until_running(unique)
    verdict = types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_ADMITTED, tier="loose", predicted_ttft_ms=12)
    promote = planner_pb2.Promote(request_id=unique, attempt=1, tier="loose", verdict=verdict)
    stale = planner_pb2.Promote(request_id=unique, attempt=7, tier="tight", verdict=verdict)
    world.planner.tell(planner_pb2.Directive(seq=1, promote=stale))
    world.planner.tell(planner_pb2.Directive(seq=2, promote=promote))
    await eventually(lambda: world.listener.chunks.get(unique))
    assert world.listener.chunks[unique][0].verdict == verdict
    assert world.engine.promoted == [(unique, "loose")]
    await world.until_recorded(unique, verdict="admitted", tier="loose")


async def test_batch_parameters_cap_the_batches_duration(world: World) -> None:
    parameters = planner_pb2.BatchParameters(duration_cap_ms=40)
    world.planner.tell(planner_pb2.Directive(seq=1, batch_parameters=parameters))
    await eventually(lambda: world.engine.duration_cap_s == 0.04)
    world.planner.tell(planner_pb2.Directive(seq=2, batch_parameters=planner_pb2.BatchParameters()))
    await eventually(lambda: world.engine.duration_cap_s is None)
    assert world.engine.promises_expected == 0
    parameters = planner_pb2.BatchParameters(duration_cap_ms=40, promises_wanted=True)
    world.planner.tell(planner_pb2.Directive(seq=3, batch_parameters=parameters))
    await eventually(lambda: world.engine.promises_expected == 1)


async def test_a_released_request_goes_to_the_shared_queue_unless_it_has_begun(world: World, unique: str) -> None:
    begun, waiting = f"{unique}-a", f"{unique}-b"
    world.engine.hold_back.add(waiting)
    for request_id in (begun, waiting):
        await world.submit(world.request(request_id))
    await world.engine.until_running(begun, waiting)
    world.engine.free_blocks = 0  # it shall not come straight back
    world.engine.step()
    await world.listener.tokens(begun, 1)
    for seq, request_id in enumerate((begun, waiting)):
        release = planner_pb2.ReleaseRequestId(request_id=request_id, attempt=1)
        world.planner.tell(planner_pb2.Directive(seq=seq, release=release))
    await world.engine.until_gone(waiting)
    record = await world.until_recorded(waiting, state="queued", attempt="2")
    assert record.stream == BEST_EFFORT_QUEUE
    assert begun in world.engine.running
    await world.store.cancel(waiting)


async def test_subscribe_and_attach_need_an_admission_id(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await world.stub.Attach(worker_pb2.AttachRequest(request_id="r"))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in world.stub.Subscribe(worker_pb2.SubscribeRequest()):
            pass
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_attach_moves_a_running_request_to_another_admission_process(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    world.engine.step(2)
    await world.listener.tokens(unique, 2)
    answer = await world.stub.Attach(
        worker_pb2.AttachRequest(request_id=unique, admission_id=f"b-{unique}", from_token=1)
    )
    assert (answer.found, answer.output_tokens) == (True, 2)
    got: list[int] = []
    call = world.stub.Subscribe(worker_pb2.SubscribeRequest(admission_id=f"b-{unique}"))
    world.engine.step()
    async with asyncio.timeout(5):
        async for batch in call:
            got += [token for chunk in batch.chunks for token in chunk.token_ids]
            if any(chunk.finish_reason for chunk in batch.chunks):
                break
    assert got == [1001, 1002]
    assert world.listener.ids[unique] == [1000, 1001]


async def test_a_stop_that_is_cancelled_stops_the_engine_all_the_same(world: World, unique: str) -> None:
    await world.submit(world.request(unique))
    await world.engine.until_running(unique)
    stopping = asyncio.create_task(world.worker.stop())
    asyncio.get_running_loop().call_soon(stopping.cancel)  # a second signal, while it is at it
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert world.engine.stopped
