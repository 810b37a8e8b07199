"""An admission process without requests holds no task more than before its first one, however requests ended."""

import asyncio

import pytest

from protos import types_pb2
from services.admission.tokens import ModelTokens
from services.client import SloServeError
from tests.services.admission.world import World, generate, ids_of, soon
from tests.tasks import IdleTasks

STOP = types_pb2.FINISH_REASON_STOP


async def test_nothing_is_left_of_requests_however_they_end(world: World, tokens: ModelTokens) -> None:
    await world.start_worker("w1")
    await soon(lambda: len(world.admission.replicas) == 2)
    ids = ids_of(tokens, "no token is lost")
    idle = IdleTasks()

    finished = world.client.generate("Go on.", application="chatbot", request_id="finished")
    await anext(finished)
    await world.placed()
    world.worker.emit("finished", ids, finish=STOP)
    assert [event async for event in finished]

    left = world.stub.Generate(generate(request_id="left"))
    await anext(aiter(left))
    await world.placed(2)
    left.cancel()
    await soon(lambda: len(world.worker.cancels) == 1)

    world.router.hold = asyncio.Event()
    placing = world.stub.Generate(generate(request_id="placing"))
    await soon(lambda: len(world.router.place_requests) == 3)
    placing.cancel()
    await soon(lambda: world.admission.sessions.get("placing") is None)
    world.router.hold.set()
    world.router.hold = None

    resumed = world.stub.Generate(generate(request_id="resumed", resume_grace_s=30.0))
    await anext(aiter(resumed))
    await soon(lambda: world.router.placed[-1].request_id == "resumed")
    await world.worker.claim(world.router.placed[-1])
    resumed.cancel()
    again = world.client.resume("resumed")
    await anext(again)
    world.worker.emit("resumed", ids, finish=STOP)
    assert [event async for event in again]

    lost = world.client.generate("Go on.", application="chatbot", request_id="lost")
    await anext(lost)
    await soon(lambda: world.router.placed[-1].request_id == "lost")
    await world.worker.claim(world.router.placed[-1])
    world.router.replica_id = "w9"  # nobody
    await world.worker.die()
    await soon(lambda: bool(world.router.replaces))
    assert await world.client.cancel("lost")
    assert [event async for event in lost]

    with pytest.raises(SloServeError):
        async for _ in world.client.generate("", application="nobody's"):
            pass
    await idle.returned()
    assert not world.admission.sessions.live()
