"""A front door one of whose own tasks fails: that is seen, its health says so, and it goes on."""

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.admission.rescue import Rescue
from services.admission.session import Session
from services.admission.tokens import ModelTokens
from services.admission.worker_link import WorkerLink
from services.admission.workers import Workers
from services.common.rpc import open_channel
from tests.services.admission.world import PATIENCE_S, World, generate, ids_of, soon

SERVICE = "slosserve.v1.Admission"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def failures(world: World) -> dict[str, int]:
    return {point.attributes["slos_serve.task"]: point.value for point in world.metric("slos_serve.task_failures")}


async def test_a_failing_sweep_is_counted_and_its_health_says_so_until_it_runs(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, swept = True, asyncio.Event()

    async def sweep(_: Rescue) -> None:
        if broken:
            raise ValueError("a bug")
        swept.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Rescue, "sweep_forever", sweep)
    another = await world.start_admission()
    async with open_channel(f"127.0.0.1:{another.port}") as channel, asyncio.timeout(PATIENCE_S):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        while (await watch.read()).status != NOT_SERVING:
            pass
        broken = False
        await swept.wait()
        while (await watch.read()).status != SERVING:
            pass
        watch.cancel()
    assert sum(failures(world).values()) >= 1
    assert "a bug" in caplog.text


async def test_a_change_of_the_fleet_that_fails_is_made_up_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = Workers.fleet_changed
    failed = False

    def fails_once(self: Workers, *arguments: Any) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise ValueError("a bug")
        changed(self, *arguments)

    monkeypatch.setattr(Workers, "fleet_changed", fails_once)
    await world.start_worker("w1")
    await soon(lambda: world.admission._workers.link("w1") is not None)
    assert failures(world) == {"ReplicaWatcher._poll": 1}


async def test_a_request_that_meets_a_bug_fails_alone(
    world: World, tokens: ModelTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, poisoned = Session.take, list[str]()

    def poisons(self: Session, *arguments: Any) -> Any:
        if self.request_id in poisoned:
            raise ValueError("a bug")
        return take(self, *arguments)

    monkeypatch.setattr(Session, "take", poisons)
    bad = world.client_of(generate())
    await bad.read()
    poisoned.append((await world.placed()).request_id)
    good = world.client_of(generate())
    await good.read()
    queued = await world.placed(2)
    for request_id in (*poisoned, queued.request_id):
        world.worker.emit(request_id, ids_of(tokens, "one"))
    assert (await good.read()).HasField("tokens")
    code, details = await bad.code(), await bad.details()
    assert "ValueError" in details, (code, details)
    await soon(lambda: [cancel.request_id for cancel in world.worker.cancels] == poisoned)
    assert failures(world) == {"Session.take": 1}
    good.cancel()


async def test_a_token_stream_that_fails_is_followed_again_from_where_it_stood(
    world: World, tokens: ModelTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_on, failed = WorkerLink._hand_on, False

    async def fails_once(self: WorkerLink, batch: Any) -> None:
        nonlocal failed
        if batch.chunks and not failed:
            failed = True
            raise ValueError("a bug")
        await hand_on(self, batch)

    monkeypatch.setattr(WorkerLink, "_hand_on", fails_once)
    call = world.client_of(generate())
    await call.read()
    request_id, ids = (await world.placed()).request_id, ids_of(tokens, "one two three")
    world.worker.emit(request_id, ids)
    assert list((await call.read()).tokens.ids) == ids
    assert failures(world) == {"WorkerLink._follow": 1}
    call.cancel()
