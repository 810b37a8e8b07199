"""The first-token hold: in the hook, which plans with it, and in the worker, which holds."""

import time

import msgspec
import pytest

from services.common.clock import Clock
from services.worker.engine_api import EngineEnd, EngineOutput
from services.worker.first_token_hold import FirstTokenHold
from services.worker.link import ReportMessage
from tests.services.worker.driven_scheduler import DrivenScheduler, driven

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def released(replica: DrivenScheduler, count: int) -> set[int]:
    assert replica.worker_end is not None
    found: set[int] = set()
    while len(found) < count:
        assert replica.worker_end.poll(5000), f"only {found} were released"
        found |= set(msgspec.msgpack.decode(replica.worker_end.recv(), type=ReportMessage).released)
    return found


def due_s(replica: DrivenScheduler, key: str) -> float:
    table = replica.scheduler._hook.table
    return float(table.due_s[table.keys.index(key)])


@DEPTHS
def test_decode_deadlines_count_from_the_first_token_deadline_while_prefills_wait(depth: int) -> None:
    with driven(depth=depth, hold_first_token=True) as replica:
        first = replica.send("first", 32, 400, ttft_s=3.0, tpot_s=0.05)
        replica.send("long", 30_000, 2, ttft_s=8.0)
        while not first.tokens:
            replica.step()
        tokens = int(replica.scheduler._hook.table.ints("tokens")[0])
        assert due_s(replica, "first") == pytest.approx(first.terms.ttft_deadline_s + tokens * 0.05)


@DEPTHS
def test_it_is_released_as_soon_as_no_prefill_waits(depth: int) -> None:
    with driven(depth=depth, hold_first_token=True) as replica:
        first = replica.send("first", 32, 400, ttft_s=30.0, tpot_s=0.05)
        long = replica.send("long", 6000, 400, ttft_s=20.0)
        while not long.tokens:
            replica.step()
        assert first.tokens
        replica.step()
        hook = replica.scheduler._hook
        assert len(hook.hold) == 0
        assert released(replica, 2) == {1, 2}
        tokens = int(hook.table.ints("tokens")[0])
        assert due_s(replica, "first") == pytest.approx(long.times_s[0] + (tokens - 2 + (depth == 1)) * 0.05, abs=0.15)
        replica.run()
        assert first.missed == ""


@DEPTHS
def test_alone_nothing_is_held(depth: int) -> None:
    with driven(depth=depth, hold_first_token=True) as replica:
        alone = replica.send("alone", 32, 20, ttft_s=30.0)
        replica.run()
        assert released(replica, 1) == {1}
        assert alone.missed == ""


@DEPTHS
def test_without_the_setting_nothing_is_said_about_it(depth: int) -> None:
    with driven(depth=depth) as replica:
        replica.send("alone", 32, 20, ttft_s=30.0)
        replica.run()
        assert replica.scheduler._hook.hold.released == []
        assert len(replica.scheduler._hook.hold) == 0


def output(*ids: int, end: EngineEnd | None = None) -> EngineOutput:
    return EngineOutput("r", ids, time.monotonic(), end)


async def test_what_is_held_leaves_together_and_in_order() -> None:
    out: list[EngineOutput] = []
    hold = FirstTokenHold(time.monotonic() + 60, Clock(), out.append)
    assert hold.keep(output(1))
    assert hold.keep(output(2, 3))
    assert out == []
    before_s = time.monotonic()
    hold.release()
    assert [one.token_ids for one in out] == [(1, 2, 3)]
    assert out[0].emitted_at_s >= before_s
    assert not hold.keep(output(4))


async def test_the_end_takes_what_is_held_along() -> None:
    out: list[EngineOutput] = []
    hold = FirstTokenHold(time.monotonic() + 60, Clock(), out.append)
    assert hold.keep(output(1))
    assert not hold.keep(output(2, end=EngineEnd.STOP))
    assert [one.token_ids for one in out] == [(1,)]


async def test_nothing_is_held_after_the_deadline_or_a_release_before_the_first_token() -> None:
    late = FirstTokenHold(time.monotonic() - 0.001, Clock(), lambda _: None)
    assert not late.keep(output(1))
    early = FirstTokenHold(time.monotonic() + 60, Clock(), lambda _: None)
    early.release()
    assert not early.keep(output(1))


async def test_what_is_cancelled_never_leaves() -> None:
    out: list[EngineOutput] = []
    hold = FirstTokenHold(time.monotonic() + 60, Clock(), out.append)
    hold.keep(output(1))
    hold.cancel()
    assert out == []
