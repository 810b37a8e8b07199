import asyncio
from collections.abc import AsyncGenerator

import pytest

from protos import types_pb2, worker_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.worker.outbox import RECONNECT_S, Outbox
from services.worker.output import OutputEnd

LENGTH = OutputEnd(types_pb2.FINISH_REASON_LENGTH)


class HandClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.clock = Clock(lambda: self.now_s, lambda: self.now_s)


@pytest.fixture
def hand() -> HandClock:
    return HandClock()


@pytest.fixture
def outbox(hand: HandClock) -> Outbox:
    return Outbox("w0", hand.clock, retention_s=60.0)


async def next_of(batches: AsyncGenerator[worker_pb2.TokenBatch, None]) -> worker_pb2.TokenBatch:
    async with asyncio.timeout(5):
        return await anext(batches)


async def test_a_subscription_opens_with_a_numbered_message_without_chunks(outbox: Outbox, hand: HandClock) -> None:
    first = await next_of(outbox.subscribe("a0"))
    assert (first.replica_id, first.seq, len(first.chunks)) == ("w0", 1, 0)
    assert first.sent_at_us == hand.clock.now_us()


async def test_one_engine_step_leaves_as_one_message_per_admission_process(outbox: Outbox) -> None:
    mine, other = outbox.subscribe("a0"), outbox.subscribe("a1")
    await next_of(mine)
    await next_of(other)
    for number in range(200):
        outbox.open(f"r{number}", 1, "a0" if number % 2 else "a1")
    listening = [asyncio.ensure_future(next_of(mine)), asyncio.ensure_future(next_of(other))]
    await asyncio.sleep(0)

    async def request(number: int) -> None:
        outbox.publish(f"r{number}", 1, [number], emitted_us=1)

    await asyncio.gather(*(request(number) for number in range(200)))
    messages = await asyncio.gather(*listening)
    assert [len(message.chunks) for message in messages] == [100, 100]
    assert [message.seq for message in messages] == [2, 2]


async def test_output_waits_for_its_first_subscriber(outbox: Outbox) -> None:
    outbox.open("r", 1, "a0")
    outbox.publish("r", 1, [7, 8], emitted_us=5)
    outbox.finish("r", 1, LENGTH)
    batches = outbox.subscribe("a0")
    await next_of(batches)
    (chunk,) = (await next_of(batches)).chunks
    assert (chunk.offset, list(chunk.token_ids), chunk.emitted_at_us) == (0, [7, 8], 5)
    assert chunk.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_a_slow_subscriber_gets_longer_chunks_not_more_of_them(outbox: Outbox) -> None:
    outbox.open("r", 1, "a0")
    batches = outbox.subscribe("a0")
    await next_of(batches)
    for token in range(1000):
        outbox.publish("r", 1, [token], emitted_us=token)
    (chunk,) = (await next_of(batches)).chunks
    assert list(chunk.token_ids) == list(range(1000))
    outbox.publish("r", 1, [1000], emitted_us=1000)
    (chunk,) = (await next_of(batches)).chunks
    assert (chunk.offset, list(chunk.token_ids)) == (1000, [1000])


async def test_offsets_count_what_earlier_attempts_delivered(outbox: Outbox) -> None:
    outbox.open("r", 2, "a0", [1, 2, 3])
    outbox.publish("r", 2, [4], emitted_us=1)
    batches = outbox.subscribe("a0")
    await next_of(batches)
    (chunk,) = (await next_of(batches)).chunks
    assert (chunk.attempt, chunk.offset, list(chunk.token_ids)) == (2, 3, [4])


async def test_attach_sends_a_request_again_to_another_admission_process(outbox: Outbox) -> None:
    first = outbox.subscribe("a0")
    await next_of(first)
    outbox.open("r", 2, "a0", [1, 2])
    outbox.publish("r", 2, [3, 4], emitted_us=1)
    await next_of(first)

    answer = outbox.attach("r", "a1", 1, 0.0)
    assert (answer.found, answer.attempt, answer.output_tokens, answer.finished) == (True, 2, 4, False)
    outbox.publish("r", 2, [5], emitted_us=2)
    second = outbox.subscribe("a1")
    await next_of(second)
    (chunk,) = (await next_of(second)).chunks
    assert (chunk.offset, list(chunk.token_ids)) == (1, [2, 3, 4, 5])


async def test_an_ended_request_can_be_attached_to_after_its_end_was_delivered(outbox: Outbox, hand: HandClock) -> None:
    first = outbox.subscribe("a0")
    await next_of(first)
    outbox.open("r", 1, "a0")
    outbox.publish("r", 1, [3, 4], emitted_us=1)
    outbox.finish("r", 1, LENGTH)
    await next_of(first)
    hand.now_s += 59
    outbox.sweep()

    assert outbox.attach("r", "a1", 0, 0.0).finished
    second = outbox.subscribe("a1")
    await next_of(second)
    (chunk,) = (await next_of(second)).chunks
    assert (list(chunk.token_ids), chunk.finish_reason) == ([3, 4], types_pb2.FINISH_REASON_LENGTH)


async def test_attach_refuses_tokens_that_do_not_exist(outbox: Outbox) -> None:
    assert not outbox.attach("unknown", "a0", 0, 0.0).found
    outbox.open("r", 1, "a0")
    with pytest.raises(SloServeError) as refused:
        outbox.attach("r", "a0", 1, 0.0)
    assert refused.value.reason is Reason.RESUME_OUT_OF_RANGE


async def test_ended_output_is_forgotten_after_its_retention(outbox: Outbox, hand: HandClock) -> None:
    outbox.open("r", 1, "a0")
    outbox.finish("r", 1, LENGTH)
    hand.now_s += 61
    assert outbox.sweep() == []
    assert not outbox.attach("r", "a0", 0, 0.0).found


async def test_a_running_request_nobody_listens_to_is_named_once_its_grace_is_over(
    outbox: Outbox, hand: HandClock
) -> None:
    outbox.open("r", 1, "gone", grace_s=60.0)
    outbox.open("s", 1, "gone")
    hand.now_s += RECONNECT_S - 1
    assert outbox.sweep() == []
    hand.now_s += 2
    assert outbox.sweep() == ["s"]  # its client asked for no grace: there is only the time to come back
    outbox.finish("s", 1, LENGTH)
    hand.now_s += 59 - RECONNECT_S - 1
    assert outbox.sweep() == []
    outbox.attach("r", "also-gone", 0, 100.0)
    hand.now_s += 99
    assert outbox.sweep() == []
    hand.now_s += 2
    assert outbox.sweep() == ["r"]


async def test_the_newest_subscription_of_an_admission_process_wins(outbox: Outbox) -> None:
    old = outbox.subscribe("a0")
    await next_of(old)
    waiting = asyncio.ensure_future(next_of(old))
    new = outbox.subscribe("a0")
    await next_of(new)
    with pytest.raises(StopAsyncIteration):
        await waiting
    outbox.open("r", 1, "a0")
    outbox.publish("r", 1, [9], emitted_us=1)
    assert list((await next_of(new)).chunks[0].token_ids) == [9]


async def test_a_superseded_attempt_publishes_nothing(outbox: Outbox) -> None:
    outbox.open("r", 1, "a0")
    outbox.open("r", 2, "a0", [5])
    outbox.publish("r", 1, [6], emitted_us=1)
    outbox.finish("r", 1, LENGTH)
    assert outbox.attach("r", "a0", 0, 0.0).output_tokens == 1
    assert not outbox.attach("r", "a0", 0, 0.0).finished


async def test_close_ends_subscriptions_after_what_was_left(outbox: Outbox) -> None:
    batches = outbox.subscribe("a0")
    await next_of(batches)
    outbox.open("r", 1, "a0")
    outbox.finish("r", 1, LENGTH)
    outbox.close()
    assert (await next_of(batches)).chunks[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    with pytest.raises(StopAsyncIteration):
        await next_of(batches)


async def test_flush_waits_until_grpc_has_taken_everything(outbox: Outbox) -> None:
    batches = outbox.subscribe("a0")
    await next_of(batches)
    outbox.open("r", 1, "a0")
    outbox.publish("r", 1, [1], emitted_us=1)
    flushed = asyncio.ensure_future(outbox.flush(5.0))
    await next_of(batches)
    assert outbox.undelivered
    listening = asyncio.ensure_future(next_of(batches))
    await asyncio.wait_for(flushed, 5)
    assert not outbox.undelivered
    listening.cancel()
