"""Requests that are turned away before anything is done for them."""

import asyncio

import grpc
import pytest

from protos import types_pb2
from services.admission.doorkeeper import Doorkeeper
from services.client import SlosClient, SloServeError
from services.common.clock import Clock
from services.common.errors import Reason
from tests.services.admission.world import World, soon

REJECT, WAIT = types_pb2.ON_INFEASIBLE_REJECT, types_pb2.ON_INFEASIBLE_WAIT
BEST_EFFORT = types_pb2.ON_INFEASIBLE_BEST_EFFORT


class Door:
    """A doorkeeper whose clock is moved by hand."""

    def __init__(self, most: int = 2) -> None:
        self.now_s = 100.0
        self.clock = Clock(lambda: self.now_s)
        self.keeper = Doorkeeper(self.clock, most)

    def placed(self, took_s: float, times: int = 1) -> None:
        for _ in range(times):
            with self.keeper.placing(REJECT):
                self.now_s += took_s

    def queued(self, left_s: float) -> types_pb2.QueuedRequest:
        deadline_us = self.clock.now_us() + round(left_s * 1e6)
        return types_pb2.QueuedRequest(
            ttft_deadline_us=deadline_us, stages=[types_pb2.Stage(ttft_ms=100, tpot_ms=50, max_tokens=8)]
        )


def test_who_would_be_late_when_it_has_its_place_is_refused_with_the_numbers() -> None:
    door = Door()
    door.placed(0.04, times=5)
    door.keeper.check(door.queued(0.1), 0.05)
    with pytest.raises(SloServeError, match=r"takes 40\.0 ms, even alone") as refused:
        door.keeper.check(door.queued(0.08), 0.05)
    assert refused.value.reason is Reason.NO_CAPACITY
    assert refused.value.retry_after_ms == pytest.approx(40)
    [verdict] = refused.value.details
    assert isinstance(verdict, types_pb2.Verdict)
    assert (verdict.kind, verdict.ttft_slo_ms) == (types_pb2.VERDICT_KIND_REJECTED, 100)
    assert verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS


def test_a_few_slow_placements_turn_nobody_away() -> None:
    door = Door()
    door.placed(0.04, times=4)
    door.keeper.check(door.queued(0.08), 0.05)
    slow = Door()
    slow.placed(0.001, times=6)
    slow.placed(0.1, times=2)
    slow.keeper.check(slow.queued(0.08), 0.05)


def test_what_was_slow_a_moment_ago_is_tried_again() -> None:
    door = Door()
    door.placed(0.04, times=6)
    door.now_s += 0.3
    door.keeper.check(door.queued(0.08), 0.05)


def test_waiting_at_a_router_says_nothing_about_the_way() -> None:
    door = Door()
    for _ in range(8):
        with door.keeper.placing(WAIT):
            door.now_s += 0.03
    door.keeper.check(door.queued(0.06), 0.05)


def test_too_many_at_a_time_are_refused_with_turns() -> None:
    door = Door(most=2)
    with door.keeper.passing(BEST_EFFORT), door.keeper.passing(REJECT), door.keeper.passing(WAIT):
        delays_ms = []
        for _ in range(3):
            with pytest.raises(SloServeError, match="2 requests wait") as refused:
                door.keeper.let_in(BEST_EFFORT)
            assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            delays_ms.append(refused.value.retry_after_ms)
        assert delays_ms == pytest.approx([500, 750, 1000])  # two places' time, then one turn after the other
        door.keeper.let_in(WAIT)
    door.keeper.let_in(REJECT)


async def test_beyond_the_limit_nothing_is_asked_or_stored(world: World) -> None:
    narrow = await world.start_admission(max_placing=1)
    world.router.hold = asyncio.Event()
    async with SlosClient(f"127.0.0.1:{narrow.port}") as client:
        first = asyncio.ensure_future(anext(client.generate("Go.", application="chatbot")))
        await soon(lambda: len(world.router.place_requests) == 1)
        with pytest.raises(SloServeError, match="1 requests wait") as refused:
            await anext(client.generate("Go.", application="chatbot", request_id="one-too-many"))
        assert (refused.value.reason, bool(refused.value.retry_after_ms)) == (Reason.NO_CAPACITY, True)
        assert not await world.redis.exists("slos:req:one-too-many")
        world.router.hold.set()
        await first
