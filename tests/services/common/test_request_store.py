import asyncio
import time

import pytest
from redis.asyncio import Redis

from protos import types_pb2
from services.common import keys
from services.common.errors import Reason, SloServeError
from services.common.request_record import BeginResult, RequestState
from services.common.request_store import (
    KEEP_ENDED_S,
    QueueFullError,
    RequestEndedError,
    RequestHeldError,
    RequestStore,
    StaleAttemptError,
)
from tests.services.owners import claim, lease

A = keys.owner_name("w0", 1)
B = keys.owner_name("w1", 2)
QUEUE = keys.queue_key("w0", "tight")


def queued(request_id: str, attempt: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> types_pb2.QueuedRequest:
    return types_pb2.QueuedRequest(
        request_id=request_id,
        attempt=attempt,
        tenant="acme",
        application="chatbot",
        admission_id="adm-1",
        prompt_token_ids=prompt,
        arrival_us=1_700_000_000_000_000,
        ttft_deadline_us=1_700_000_000_500_000,
        tier="tight",
        traceparent="00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
    )


@pytest.fixture
async def store(broker: Redis) -> RequestStore:
    await lease(broker, "w0", 1)
    await lease(broker, "w1", 2)
    return RequestStore(broker)


async def begin(store: RequestStore, request_id: str, digest: str = "d1", tenant: str = "acme") -> BeginResult:
    return await store.begin(
        request_id, digest=digest, admission_id="adm-1", tenant=tenant, application="chatbot", arrival_us=7
    )


async def test_the_same_id_is_a_retry_with_the_same_body_and_a_conflict_with_another(store: RequestStore) -> None:
    assert await begin(store, "r") is BeginResult.NEW
    assert await begin(store, "r") is BeginResult.SAME
    assert await begin(store, "r", digest="d2") is BeginResult.CONFLICT
    assert await begin(store, "r", tenant="other") is BeginResult.CONFLICT


async def test_a_registration_that_the_append_overtook_changes_nothing_but_the_digest(store: RequestStore) -> None:
    await store.enqueue(queued("r"), QUEUE, verdict="admitted")
    assert await claim(store, "r", 1, A) == 1
    assert await begin(store, "r") is BeginResult.NEW
    record = await store.get("r")
    assert record is not None
    assert (record.state, record.attempt, record.owner) == (RequestState.CLAIMED, 1, A)
    assert await begin(store, "r") is BeginResult.SAME
    assert await begin(store, "r", digest="d2") is BeginResult.CONFLICT


async def test_an_entry_is_readable_and_carries_the_request(store: RequestStore, broker: Redis) -> None:
    await begin(store, "r")
    done = await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED", replica_id="w0", hops=2)
    [(entry_id, fields)] = await broker.xrange(QUEUE)
    assert entry_id.decode() == done.entry_id
    flat = ["app", "body", "id", "tenant", "tier", "traceparent", "tracestate", "ttft_deadline_ms", "v"]
    assert sorted(name.decode() for name in fields) == flat
    assert (fields[b"id"], fields[b"app"], fields[b"ttft_deadline_ms"]) == (b"r", b"chatbot", b"1700000000500")
    record = await store.get("r")
    assert record is not None
    assert (record.state, record.attempt, record.tier, record.replica_id) == (RequestState.QUEUED, 1, "tight", "w0")
    assert record.fields["hops"] == "2"
    assert await store.queued_request(record) == queued("r")
    assert await broker.ttl(keys.request_key("r")) == -1


async def test_a_retried_append_does_not_duplicate(store: RequestStore, broker: Redis) -> None:
    await begin(store, "r")
    first = await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED")
    again = await store.enqueue(queued("r"), keys.BEST_EFFORT_QUEUE, verdict="BEST_EFFORT")
    assert (again.stream, again.entry_id, again.fresh) == (first.stream, first.entry_id, False)
    assert await broker.xlen(QUEUE) == 1
    assert await broker.xlen(keys.BEST_EFFORT_QUEUE) == 0


async def test_concurrent_appends_of_one_attempt_leave_one_entry(store: RequestStore, broker: Redis) -> None:
    await begin(store, "r")
    done = await asyncio.gather(*(store.enqueue(queued("r"), QUEUE, verdict="ADMITTED") for _ in range(20)))
    assert len({item.entry_id for item in done}) == 1
    assert sum(item.fresh for item in done) == 1
    assert await broker.xlen(QUEUE) == 1


async def test_one_worker_wins_a_claim_and_the_loser_is_fenced(store: RequestStore, broker: Redis) -> None:
    await begin(store, "r")
    await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED")
    assert await claim(store, "r", 1, A) == 1
    assert await claim(store, "r", 1, B) == 0
    assert not await store.mark("r", 1, B, first_token_us=5)
    assert await store.mark("r", 1, A, first_token_us=6)
    record = await store.get("r")
    assert record is not None
    assert (record.state, record.owner, record.replica_id) == (RequestState.RUNNING, A, "w0")
    assert record.times_us["first_token_us"] == 6


async def test_an_unknown_request_cannot_be_claimed(store: RequestStore) -> None:
    assert await claim(store, "nobody", 1, A) == 0


async def test_finish_acknowledges_deletes_and_lets_the_hash_expire(store: RequestStore, broker: Redis) -> None:
    await broker.xgroup_create(QUEUE, keys.GROUP, id="0", mkstream=True)
    await begin(store, "r")
    entry = await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED")
    await broker.xreadgroup(keys.GROUP, A, {QUEUE: ">"})
    await claim(store, "r", 1, A)
    done = {"stream": entry.stream, "entry_id": entry.entry_id}
    assert not await store.finish("r", 1, B, RequestState.FINISHED, **done)
    assert await broker.xlen(QUEUE) == 1
    for _ in range(2):  # repeating it changes nothing
        assert await store.finish("r", 1, A, RequestState.FINISHED, **done, fields={"output_tokens": 9})
    assert await broker.xlen(QUEUE) == 0
    assert (await broker.xpending(QUEUE, keys.GROUP))["pending"] == 0
    assert 0 < await broker.ttl(keys.request_key("r")) <= KEEP_ENDED_S
    record = await store.get("r")
    assert record is not None
    assert record.state is RequestState.FINISHED
    assert record.fields["output_tokens"] == "9"
    assert not await store.finish("r", 1, A, RequestState.FAILED, **done)


async def test_placing_again_bumps_the_attempt_moves_the_entry_and_fences_the_old_owner(
    store: RequestStore, broker: Redis
) -> None:
    await broker.xgroup_create(QUEUE, keys.GROUP, id="0", mkstream=True)
    await begin(store, "r")
    old = await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED", replica_id="w0")
    await broker.xreadgroup(keys.GROUP, A, {QUEUE: ">"})
    await claim(store, "r", 1, A)
    await store.mark("r", 1, A)

    new_queue = keys.queue_key("w1", "tight")
    with pytest.raises(RequestHeldError, match="w0/1"):  # it lives: nobody takes its work away
        await store.enqueue(queued("r", 2), new_queue, verdict="ADMITTED", replica_id="w1")
    await broker.delete(keys.replica_key("w0"))
    new = await store.enqueue(queued("r", 2), new_queue, verdict="ADMITTED", replica_id="w1")
    assert new.fresh
    assert await broker.xlen(QUEUE) == 0
    assert (await broker.xpending(QUEUE, keys.GROUP))["pending"] == 0
    assert not await store.mark("r", 1, A)
    assert not await store.finish("r", 1, A, RequestState.FINISHED, stream=QUEUE, entry_id=old.entry_id)
    assert await claim(store, "r", 1, A) is None  # without a lease it claims nothing
    await lease(broker, "w0", 1)
    assert await store.claim("r", 1, A, stream=QUEUE, entry_id=old.entry_id) == 0
    with pytest.raises(StaleAttemptError):
        await store.enqueue(queued("r", 1), QUEUE, verdict="ADMITTED")
    assert await claim(store, "r", 2, B) == 2
    assert await broker.xlen(new_queue) == 1
    record = await store.get("r")
    assert record is not None
    assert record.losses == 1


async def test_a_live_worker_hands_on_what_it_holds_and_that_is_no_loss(store: RequestStore, broker: Redis) -> None:
    await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED", replica_id="w0")
    await claim(store, "r", 1, A)
    with pytest.raises(RequestHeldError):
        await store.enqueue(queued("r", 2), keys.BEST_EFFORT_QUEUE, verdict="BEST_EFFORT", giver=B)
    await store.enqueue(queued("r", 2), keys.BEST_EFFORT_QUEUE, verdict="BEST_EFFORT", giver=A)
    record = await store.get("r")
    assert record is not None
    assert (record.attempt, record.losses, record.state) == (2, 0, RequestState.QUEUED)


async def test_a_claim_in_vain_leaves_no_entry_behind_that_no_request_stands_on(
    store: RequestStore, broker: Redis
) -> None:
    await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED", replica_id="w0")
    await broker.delete(keys.request_key("r"))  # Redis lost its tail
    await broker.xgroup_create(QUEUE, keys.GROUP, id="0")
    [(_, [(entry, _)])] = await broker.xreadgroup(keys.GROUP, A, {QUEUE: ">"})
    assert await store.claim("r", 1, A, stream=QUEUE, entry_id=entry.decode()) == 0
    assert await broker.xlen(QUEUE) == 0
    assert (await broker.xpending(QUEUE, keys.GROUP))["pending"] == 0


async def test_a_later_attempt_of_nothing_is_refused(store: RequestStore, broker: Redis) -> None:
    with pytest.raises(SloServeError) as caught:
        await store.enqueue(queued("r", 2), QUEUE, verdict="ADMITTED")
    assert caught.value.reason is Reason.REQUEST_UNKNOWN
    assert await broker.exists(QUEUE) == 0


async def test_cancel_while_queued_removes_the_entry_and_blocks_a_late_append(
    store: RequestStore, broker: Redis
) -> None:
    await begin(store, "r")
    await store.enqueue(queued("r"), QUEUE, verdict="ADMITTED", replica_id="w0")
    outcome = await store.cancel("r")
    assert (outcome.previous, outcome.cancelled, outcome.replica_id) == (RequestState.QUEUED, True, "w0")
    assert await broker.xlen(QUEUE) == 0
    assert await claim(store, "r", 1, A) == 0
    with pytest.raises(RequestEndedError):
        await store.enqueue(queued("r", 2), QUEUE, verdict="ADMITTED")
    again = await store.cancel("r")
    assert (again.previous, again.cancelled) == (RequestState.CANCELLED, False)
    assert (await store.cancel("nobody")).previous is None


async def test_cancel_while_running_names_the_replica_and_stops_the_owner(store: RequestStore, broker: Redis) -> None:
    await begin(store, "r")
    entry = await store.enqueue(queued("r"), keys.BEST_EFFORT_QUEUE, verdict="BEST_EFFORT")
    await claim(store, "r", 1, A)
    await store.mark("r", 1, A)
    outcome = await store.cancel("r")
    assert (outcome.previous, outcome.replica_id, outcome.attempt) == (RequestState.RUNNING, "w0", 1)
    assert not await store.mark("r", 1, A)
    assert await store.finish(
        "r", 1, A, RequestState.FINISHED, stream=entry.stream, entry_id=entry.entry_id, fields={"output_tokens": 4}
    )
    record = await store.get("r")
    assert record is not None
    assert (record.state, record.fields["output_tokens"]) == (RequestState.CANCELLED, "4")


async def test_a_full_queue_refuses_but_counts_only_what_nobody_has_read(store: RequestStore, broker: Redis) -> None:
    await broker.xgroup_create(QUEUE, keys.GROUP, id="0", mkstream=True)
    await store.enqueue(queued("a"), QUEUE, verdict="ADMITTED", queue_limit=2)
    await store.enqueue(queued("b"), QUEUE, verdict="ADMITTED", queue_limit=2)
    with pytest.raises(QueueFullError) as caught:
        await store.enqueue(queued("c"), QUEUE, verdict="ADMITTED", queue_limit=2)
    assert caught.value.retry_after_ms
    assert await store.get("c") is None
    await broker.xreadgroup(keys.GROUP, A, {QUEUE: ">"}, count=1)
    assert (await store.enqueue(queued("c"), QUEUE, verdict="ADMITTED", queue_limit=2)).fresh
    assert await broker.xlen(QUEUE) == 3


async def test_who_died_before_the_first_token_is_succeeded_under_a_new_attempt(
    store: RequestStore, broker: Redis
) -> None:
    await begin(store, "r")
    entry = await store.enqueue(queued("r"), keys.BEST_EFFORT_QUEUE, verdict="BEST_EFFORT")
    await claim(store, "r", 1, A)
    assert await claim(store, "r", 1, B) == 0  # w0 lives
    await lease(broker, "w0", 99)  # w0 restarted: its earlier process is gone
    assert await claim(store, "r", 1, B) == 2
    assert not await store.mark("r", 1, A)
    assert not await store.finish("r", 1, A, RequestState.FINISHED, stream=entry.stream, entry_id=entry.entry_id)
    assert await broker.xlen(keys.BEST_EFFORT_QUEUE) == 1
    third = await lease(broker, "w2", 3)
    await broker.delete(keys.replica_key("w1"))
    assert await claim(store, "r", 1, third) == 3
    assert await store.mark("r", 3, third)
    again = await lease(broker, "w0", 1)
    assert await claim(store, "r", 1, again) == 0  # running: tokens may be out, only a re-placement may move it


async def test_placing_again_after_a_succession_joins_it(store: RequestStore, broker: Redis) -> None:
    entry = await store.enqueue(queued("r"), keys.BEST_EFFORT_QUEUE, verdict="BEST_EFFORT")
    await claim(store, "r", 1, A)
    await broker.delete(keys.replica_key("w0"))
    await claim(store, "r", 1, B)
    joined = await store.enqueue(queued("r", 2), QUEUE, verdict="ADMITTED")
    assert (joined.entry_id, joined.fresh) == (entry.entry_id, False)
    assert await broker.xlen(QUEUE) == 0


async def test_a_lost_redis_is_unavailable_with_a_delay() -> None:
    from services.common.broker import open_redis

    store = RequestStore(open_redis("redis://127.0.0.1:1/0"))
    started_s = time.monotonic()
    with pytest.raises(SloServeError) as caught:
        await store.get("r")
    assert caught.value.reason is Reason.BROKER_UNAVAILABLE
    assert caught.value.retry_after_ms
    assert time.monotonic() - started_s < 3
