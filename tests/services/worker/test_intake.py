"""Deliveries are claimed side by side, none is lost on the way, and an error in one is not swallowed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from protos import types_pb2
from services.common.clock import Clock
from services.common.keys import queue_key
from services.common.stream_reader import Delivery
from services.core.lengths import LengthForecaster
from services.worker.best_effort_room import BestEffortRoom
from services.worker.intake import Intake
from tests.services.worker.scripted_engine import INFO, MODEL
from tests.services.worker.worker_world import eventually

LOOSE = queue_key("w0", "loose")


def delivery(number: int) -> Delivery:
    request = types_pb2.QueuedRequest(request_id=f"r{number}", attempt=1)
    return Delivery(LOOSE, f"{number}-0", request, 1, lambda *_: asyncio.sleep(0))


class Reader:
    """Gives what it has, then asks which queues to read for as long as there are any."""

    def __init__(self, count: int) -> None:
        self._given = [delivery(number) for number in range(count)]

    async def deliveries(self, streams: Callable[[], Sequence[str]]) -> AsyncIterator[Delivery]:
        for one in self._given:
            yield one
        while streams():  # noqa: ASYNC110  (the intake ends it at a drain, and announces nothing)
            await asyncio.sleep(0)
        await asyncio.Event().wait()


class Claims:
    """Each claim waits for `go`, and then is another's."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.go = asyncio.Event()
        self._error = error

    async def claim(self, asked: Delivery) -> None:
        self.asked.append(asked.request.request_id)
        await self.go.wait()
        if self._error is not None:
            raise self._error


class NothingRuns:
    entries: dict[str, list[str]]

    def __getattr__(self, name: str) -> Any:
        return {} if name == "entries" else lambda *_: False


def an_intake(count: int, claims: Claims) -> Intake:
    return Intake(
        reader=Reader(count),
        claims=claims,
        generations=NothingRuns(),
        outbox=None,
        room=BestEffortRoom(INFO, MODEL),
        forecaster=LengthForecaster(),
        info=INFO,
        clock=Clock(),
        replica_id="w0",
        tiers=["loose"],
        may_claim=lambda: True,
        weight_of=lambda _: 1,
    )


async def test_a_burst_is_claimed_side_by_side_and_counts_as_held_meanwhile() -> None:
    claims = Claims()
    intake = an_intake(3, claims)
    running = asyncio.create_task(intake.run())
    await eventually(lambda: claims.asked == ["r0", "r1", "r2"])
    assert intake.entries == {LOOSE: ["0-0", "1-0", "2-0"]}
    claims.go.set()
    await eventually(lambda: not intake.entries)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_only_so_many_claims_are_under_way() -> None:
    claims = Claims()
    running = asyncio.create_task(an_intake(100, claims).run())
    await eventually(lambda: len(claims.asked) == 64)
    claims.go.set()
    await eventually(lambda: len(claims.asked) == 100)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_drain_waits_for_the_claims_under_way() -> None:
    claims = Claims()
    intake = an_intake(2, claims)
    running = asyncio.create_task(intake.run())
    await eventually(lambda: len(claims.asked) == 2)
    draining = asyncio.create_task(intake.drain(30.0))
    await asyncio.sleep(0)
    assert not draining.done()
    claims.go.set()
    await draining
    assert not intake.entries
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_unexpected_error_in_a_claim_ends_the_task_that_reads() -> None:
    claims = Claims(ValueError("broken"))
    claims.go.set()
    with pytest.raises(ExceptionGroup) as failed:
        await an_intake(1, claims).run()
    assert isinstance(failed.value.exceptions[0], ValueError)
