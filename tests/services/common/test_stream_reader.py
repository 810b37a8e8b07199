import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from redis.asyncio import Redis

from protos import types_pb2
from services.common import keys
from services.common.request_record import RequestState
from services.common.request_store import RequestStore
from services.common.stream_reader import Delivery, StreamReader
from tests.services.owners import claim, lease

QUEUE = keys.queue_key("w0", "tight")
LOOSE = keys.queue_key("w0", "loose")
A, B = keys.owner_name("w0", 1), keys.owner_name("w1", 2)


async def put(broker: Redis, request_id: str, stream: str = QUEUE) -> str:
    request = types_pb2.QueuedRequest(request_id=request_id, attempt=1, prompt_token_ids=[1])
    return (await RequestStore(broker).enqueue(request, stream, verdict="ADMITTED")).entry_id


async def take(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    async with asyncio.timeout(5):
        return [await anext(deliveries) for _ in range(count)]


async def read_as(broker: Redis, consumer: str, stream: str = QUEUE) -> None:
    """Deliver everything new to `consumer`, which then falls silent."""
    await StreamReader(broker, consumer).ensure_groups([stream])
    await broker.xreadgroup(keys.GROUP, consumer, {stream: ">"})


async def pending(broker: Redis, stream: str = QUEUE) -> int:
    return int((await broker.xpending(stream, keys.GROUP))["pending"])


async def test_entries_written_before_the_group_existed_are_read_and_acknowledged(broker: Redis) -> None:
    await put(broker, "a")
    reader = StreamReader(broker, A)
    [got] = await take(reader.deliveries(lambda: [QUEUE]), 1)
    assert (got.request.request_id, got.stream, got.deliveries) == ("a", QUEUE, 1)
    assert await pending(broker) == 1
    await got.ack()
    assert await pending(broker) == 0


async def test_making_the_group_twice_is_fine_but_other_errors_show(broker: Redis) -> None:
    reader = StreamReader(broker, A)
    await reader.ensure_groups([QUEUE])
    await reader.ensure_groups([QUEUE])
    await broker.set("slos:q:wrong", "a string")
    with pytest.raises(Exception, match="WRONGTYPE"):
        await reader.ensure_groups(["slos:q:wrong"])


async def test_best_effort_is_read_only_while_asked_for(broker: Redis) -> None:
    streams = [QUEUE]
    deliveries = StreamReader(broker, A, block_ms=20).deliveries(lambda: streams)
    await put(broker, "later", keys.BEST_EFFORT_QUEUE)
    await put(broker, "now")
    [first] = await take(deliveries, 1)
    assert first.request.request_id == "now"
    streams.append(keys.BEST_EFFORT_QUEUE)
    [second] = await take(deliveries, 1)
    assert (second.request.request_id, second.stream) == ("later", keys.BEST_EFFORT_QUEUE)


async def test_best_effort_is_shared_out_one_by_one(broker: Redis) -> None:
    for number in range(4):
        await put(broker, f"r{number}", keys.BEST_EFFORT_QUEUE)
    readers = [StreamReader(broker, owner).deliveries(lambda: [keys.BEST_EFFORT_QUEUE]) for owner in (A, B)]
    got = [await take(readers[turn % 2], 1) for turn in range(4)]
    assert sorted(item.request.request_id for [item] in got) == ["r0", "r1", "r2", "r3"]


async def test_a_restarted_worker_takes_over_what_was_pending_at_once(broker: Redis) -> None:
    for number in range(40):  # more than one page of the cursor
        await put(broker, f"r{number}")
    await read_as(broker, "w0/0")
    got = await take(StreamReader(broker, A).deliveries(lambda: [QUEUE]), 40)
    assert [item.request.request_id for item in got] == [f"r{number}" for number in range(40)]
    assert {item.deliveries for item in got} == {2}


async def test_deleted_entries_among_the_stale_ones_are_stepped_over(broker: Redis) -> None:
    entries = [await put(broker, f"r{number}") for number in range(20)]
    await read_as(broker, "w0/0")
    for entry in entries[::2]:
        await broker.xdel(QUEUE, entry)
    got = await take(StreamReader(broker, A).deliveries(lambda: [QUEUE]), 10)
    assert [item.request.request_id for item in got] == [f"r{number}" for number in range(1, 20, 2)]


async def test_a_kept_alive_entry_is_not_taken_over(broker: Redis) -> None:
    stream = keys.BEST_EFFORT_QUEUE
    held = await put(broker, "held", stream)
    await put(broker, "dropped", stream)
    await read_as(broker, A, stream)
    owner = StreamReader(broker, A)
    stop = asyncio.Event()

    async def refresh() -> None:
        while not stop.is_set():
            await owner.keep_alive(stream, [held])
            await asyncio.sleep(0.01)

    beating = asyncio.create_task(refresh())
    other = StreamReader(broker, B, stale_ms=200, reclaim_every_s=0.02, block_ms=10)
    [got] = await take(other.deliveries(lambda: [stream]), 1)
    assert (got.request.request_id, got.deliveries) == ("dropped", 2)
    rows = await broker.xpending_range(stream, keys.GROUP, "-", "+", 10)
    assert {row["message_id"].decode(): (row["consumer"].decode(), row["times_delivered"]) for row in rows} == {
        held: (A, 1),
        got.entry_id: (B, 2),
    }
    stop.set()
    await beating


async def test_the_nth_delivery_in_vain_is_the_last(broker: Redis) -> None:
    store = RequestStore(broker)
    stream = keys.BEST_EFFORT_QUEUE
    entry = await put(broker, "poison", stream)
    dead: list[tuple[str, str]] = []

    async def on_dead(request: types_pb2.QueuedRequest, reason: str) -> None:
        dead.append((request.request_id, reason))

    for life in range(3):  # each worker claims it and dies: the next one has its lease
        owner = keys.owner_name("w0", life)
        if life == 0:
            await read_as(broker, owner, stream)
        else:
            await broker.xautoclaim(stream, keys.GROUP, owner, 0)
        await lease(broker, "w0", life)
        assert await claim(store, "poison", 1, owner) == life + 1
    await broker.delete(keys.replica_key("w0"))
    last = StreamReader(broker, B, stale_ms=0, block_ms=10, max_deliveries=3, on_dead=on_dead)
    await put(broker, "healthy", stream)
    [got] = await take(last.deliveries(lambda: [stream]), 1)
    assert got.request.request_id == "healthy"
    assert dead == [("poison", "not run after 3 deliveries")]
    [(_, fields)] = await broker.xrange(keys.DEAD_LETTERS)
    assert (fields[b"id"], fields[b"entry"], fields[b"deliveries"]) == (b"poison", entry.encode(), b"4")
    assert types_pb2.QueuedRequest.FromString(fields[b"body"]).request_id == "poison"
    record = await store.get("poison")
    assert record is not None
    assert record.state is RequestState.FAILED
    assert await broker.ttl(keys.request_key("poison")) > 0
    assert await broker.xlen(stream) == 1


async def test_a_request_in_the_hands_of_a_live_owner_never_becomes_a_dead_letter(broker: Redis) -> None:
    await lease(broker, "w0", 1)
    store = RequestStore(broker)
    entry = await put(broker, "long")
    assert await claim(store, "long", 1, A) == 1
    assert not await store.bury("long", stream=QUEUE, entry_id=entry, reason="too often", deliveries=9)
    assert await broker.xlen(QUEUE) == 1
    assert await broker.xlen(keys.DEAD_LETTERS) == 0


@pytest.mark.parametrize("fields", [{"id": "x"}, {"v": "1", "body": b"\xff\xff"}, {"v": "9", "body": b""}])
async def test_what_is_no_request_goes_to_the_dead_letters_at_once(broker: Redis, fields: dict[str, bytes]) -> None:
    await broker.xadd(QUEUE, fields)
    await put(broker, "good")
    [got] = await take(StreamReader(broker, A).deliveries(lambda: [QUEUE]), 1)
    assert got.request.request_id == "good"
    [(_, buried)] = await broker.xrange(keys.DEAD_LETTERS)
    assert buried[b"reason"].startswith(b"malformed")


async def test_reading_goes_on_after_redis_forgot_the_group(broker: Redis) -> None:
    await put(broker, "a")
    deliveries = StreamReader(broker, A, block_ms=10).deliveries(lambda: [QUEUE, LOOSE])
    await take(deliveries, 1)
    await broker.flushall()
    await put(broker, "b", LOOSE)
    [got] = await take(deliveries, 1)
    assert got.request.request_id == "b"


async def test_entries_whose_reply_was_lost_are_delivered_again_and_what_is_held_is_not(broker: Redis) -> None:
    running = await put(broker, "running")
    await read_as(broker, A)
    lost = await put(broker, "lost")
    gone = await put(broker, "gone")
    await read_as(broker, A)  # Redis gave them to this consumer; the connection broke before the reply was read
    await broker.xdel(QUEUE, gone)
    recovered = StreamReader(broker, A, held=lambda: {QUEUE: [running]}).recover([QUEUE])
    assert [(item.request.request_id, item.entry_id, item.deliveries) async for item in recovered] == [
        ("lost", lost, 1)
    ]
    rows = await broker.xpending_range(QUEUE, keys.GROUP, "-", "+", 10)
    assert gone not in {row["message_id"].decode() for row in rows}


async def test_consumers_that_are_gone_leave_the_group_unless_they_hold_something(broker: Redis) -> None:
    stream = keys.BEST_EFFORT_QUEUE
    await put(broker, "held", stream)
    await read_as(broker, "holder", stream)
    entry = await put(broker, "done", stream)
    await read_as(broker, "gone", stream)
    await broker.xack(stream, keys.GROUP, entry)
    reader = StreamReader(broker, B, block_ms=10, forget_consumers_ms=0)
    await put(broker, "next", stream)
    await take(reader.deliveries(lambda: [stream]), 1)
    rows = await broker.xinfo_consumers(stream, keys.GROUP)
    assert sorted(row["name"].decode() for row in rows) == ["holder", B]


async def test_no_stream_to_read_is_no_busy_loop(broker: Redis) -> None:
    asked = 0
    streams: Sequence[str] = ()

    def wanted() -> Sequence[str]:
        nonlocal asked
        asked += 1
        return streams

    waiting = asyncio.ensure_future(anext(StreamReader(broker, A, block_ms=50).deliveries(wanted)))
    done, _ = await asyncio.wait([waiting], timeout=0.3)
    assert not done
    assert 1 <= asked <= 8
    streams = (QUEUE,)
    await put(broker, "a")
    assert (await asyncio.wait_for(waiting, 5)).request.request_id == "a"
