"""Best effort on the real engine, emulated: in its queue, pulled, promoted, preempted, aged; and calls that wait."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio

from protos import admission_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from services.cli.replicas import list_replicas
from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec
from services.common.errors import Reason
from services.common.keys import BEST_EFFORT_QUEUE
from services.common.rpc import open_channel
from services.common.stream_entry import decode_entry
from services.common.wire import perf_model_from_wire
from tests.e2e.calls import Reply, admission, request
from tests.e2e.test_two_workers import expected
from tests.services.router.world import error_of

ADMITTED, BEST_EFFORT = types_pb2.VERDICT_KIND_ADMITTED, types_pb2.VERDICT_KIND_BEST_EFFORT
WAIT, REJECT = types_pb2.ON_INFEASIBLE_WAIT, types_pb2.ON_INFEASIBLE_REJECT
PRESET = "opt-6.7b-a100"
PATIENCE_S = 6.0
_BETWEEN_S = 0.12  # arrivals of a load that one replica cannot promise


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[LocalStack]:
    """One emulated A100 with little memory, so that a few requests fill it."""
    spec = StackSpec(
        data_dir=tmp_path,
        engine="emulated",
        preset=PRESET,
        start_timeout_s=400.0,
        service_environment={
            "worker": {
                "SLOS_KV_BLOCKS": "600",
                "SLOS_MAX_MODEL_LEN": "9000",
                "SLOS_BEST_EFFORT_PATIENCE_S": f"{PATIENCE_S:g}",
            },
        },
    )
    async with LocalStack(spec) as running:
        yield running


class Call:
    """A call under way; `reply` grows."""

    def __init__(self, stack: LocalStack, message: admission_pb2.GenerateRequest) -> None:
        self.message = message
        self.reply = Reply()
        self.changes: list[types_pb2.Verdict] = []
        self._news = asyncio.Event()
        self.done = asyncio.create_task(self._run(stack.admission_address))

    async def _run(self, address: str) -> Reply:
        async with admission(address) as stub:
            async for event in stub.Generate(self.message, timeout=240):
                if event.WhichOneof("event") == "verdict_changed":
                    self.changes.append(event.verdict_changed.verdict)
                self.reply.take(event)
                self._news.set()
        return self.reply

    async def until(self, kind: str) -> None:
        """Wait for an event of that kind."""
        while kind not in self.reply.order:
            self._news.clear()
            waiting = asyncio.create_task(self._news.wait())
            await asyncio.wait({waiting, self.done}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            assert kind in self.reply.order or not self.done.done(), self.done

    async def exact(self) -> Reply:
        """The whole reply, every token the one it must be."""
        reply = await self.done
        assert reply.ids == expected(self.message, self.message.sampling.max_tokens)
        return reply


def firm(
    prompt_tokens: int, max_tokens: int, salt: int, ttft_ms: float, **fields: object
) -> admission_pb2.GenerateRequest:
    """A request without an application: it is decided on arrival."""
    stage = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=ttft_ms, tpot_ms=100)
    application = str(fields.pop("application", ""))
    return request(application, prompt_tokens, max_tokens, salt=salt, stages=[stage], **fields)


async def too_late(stack: LocalStack, prompt_tokens: int, max_tokens: int, salt: int) -> Call:
    """A request that an idle replica could serve in time, had it no way to go there: best effort, never promoted."""
    while True:
        [replica] = await list_replicas(stack.router_address)
        idle_s = perf_model_from_wire(replica.perf_model).zero_load_prefill_s(prompt_tokens)
        call = Call(stack, firm(prompt_tokens, max_tokens, salt, idle_s * 1000 + 1))
        try:
            await call.until("verdict")
        except AssertionError:  # it has failed: a slower model was learnt in between
            assert (await error_of(call.done)).reason is Reason.SLO_IMPOSSIBLE
        else:
            assert call.reply.verdict.kind == BEST_EFFORT
            return call


async def promising(stack: LocalStack) -> None:
    """Wait until the planner knows the replica again."""
    for salt in range(9000, 9600):
        if (await Call(stack, firm(30, 1, salt, 5000)).done).verdict.kind == ADMITTED:
            return
    raise AssertionError("the planner does not promise any more")


async def status(stack: LocalStack) -> worker_pb2.StatusResponse:
    async with open_channel(stack.addresses.worker[0], traced=False) as channel:
        return await worker_pb2_grpc.WorkerStub(channel).Status(worker_pb2.StatusRequest(), timeout=10)


@pytest.mark.timeout(600)
async def test_the_life_of_best_effort(stack: LocalStack) -> None:
    queue = redis.asyncio.from_url(stack.redis_url)
    try:
        await promoted_once_there_is_room(stack)
        await preempted_first_and_complete_all_the_same(stack)
        await waits_for_room_and_leaves_nothing(stack, queue)
        await durable_and_readable(stack, queue)
    finally:
        await queue.aclose()


async def durable_and_readable(stack: LocalStack, queue: "redis.asyncio.Redis") -> None:
    """Without a planner nothing is promised; what does not fit waits in the queue, which outlives Redis itself."""
    await stack.kill("planner-0")
    filler = Call(stack, firm(6000, 60, 1, 4000))
    await filler.until("tokens")
    calls = [Call(stack, firm(4000, 5, 2 + index, 3000)) for index in range(6)]
    for call in calls:
        await call.until("verdict")
        assert call.reply.verdict.kind == BEST_EFFORT
        assert call.reply.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_NO_PLANNER
    entries = await queue.xrange(BEST_EFFORT_QUEUE)
    assert entries, "not everything fits at once"
    named = {decode_entry(fields).request_id: fields for _, fields in entries}
    assert named.keys() <= {call.reply.request_id for call in (filler, *calls)}
    for fields in named.values():
        assert {b"id", b"app", b"tenant", b"tier", b"ttft_deadline_ms", b"traceparent", b"v", b"body"} <= fields.keys()
        assert fields[b"tier"] == b"best-effort"
    await stack.kill("redis")
    await stack.restart("redis")
    await queue.connection_pool.disconnect()
    for call in (filler, *calls):
        await call.exact()  # pulled as there was room
    await stack.restart("planner-0")
    await promising(stack)
    assert await queue.xlen(BEST_EFFORT_QUEUE) == 0


async def promoted_once_there_is_room(stack: LocalStack) -> None:
    """A request behind a long one cannot be promised; the long one is cancelled, and its client is told."""
    async with admission(stack.admission_address) as stub:
        long = Call(stack, firm(8000, 600, 20, 4000))
        await long.until("tokens")
        assert long.reply.verdict.kind == ADMITTED
        blocked = Call(stack, firm(6000, 20, 21, 9000))
        await blocked.until("verdict")
        assert blocked.reply.verdict.kind == BEST_EFFORT
        assert blocked.reply.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_KV_BLOCKS
        await stub.Cancel(admission_pb2.CancelRequest(request_id=long.reply.request_id), timeout=10)
        reply = await blocked.exact()
        assert [verdict.kind for verdict in blocked.changes] == [ADMITTED]
        assert reply.order.index("verdict_changed") < reply.order.index("finished")
        assert reply.finished is not None
        assert reply.finished.promised
        assert reply.finished.stages[0].met


async def preempted_first_and_complete_all_the_same(stack: LocalStack) -> None:
    """Best effort holds the memory that a promise needs: it gives it back, and goes on later without a lost token."""
    before = (await status(stack)).preemptions
    greedy = await too_late(stack, 8000, 300, 30)
    await greedy.until("tokens")
    promised = Call(stack, firm(3000, 40, 31, 4000))
    reply = await promised.exact()
    assert reply.verdict.kind == ADMITTED
    assert (await status(stack)).preemptions > before
    await greedy.exact()


async def waits_for_room_and_leaves_nothing(stack: LocalStack, queue: "redis.asyncio.Redis") -> None:
    """WAIT: offered again until there is room, or until the deadline; nothing is queued meanwhile."""
    async with admission(stack.admission_address) as stub:
        long = Call(stack, firm(8000, 600, 40, 4000, application="summarizer"))  # no length is known of such
        await long.until("tokens")
        patient = Call(stack, firm(3000, 8, 41, 9000, on_infeasible=WAIT))
        hasty = Call(stack, firm(3000, 8, 42, 1500, on_infeasible=WAIT))
        error = await error_of(hasty.done)
        assert error.reason is Reason.NO_CAPACITY
        assert not patient.reply.order
        streams = [key async for key in queue.scan_iter("slos:q:*")]
        assert sum([await queue.xlen(stream) for stream in streams]) == 1  # the long one's
        await stub.Cancel(admission_pb2.CancelRequest(request_id=long.reply.request_id), timeout=10)
        reply = await patient.exact()
        assert reply.order[0] == "verdict"
        assert reply.verdict.kind == ADMITTED


@pytest.mark.timeout(600)
async def test_it_does_not_starve_under_a_load_that_would_fill_the_replica_for_ever(stack: LocalStack) -> None:
    full, stop = asyncio.Event(), asyncio.Event()
    load = asyncio.create_task(overload(stack, full, stop))
    await full.wait()
    old = await too_late(stack, 4000, 20, 5000)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    reply = await old.exact()
    took_s = loop.time() - began_s
    stop.set()
    replies = await load
    admitted = [one for one in replies if isinstance(one, Reply)]
    assert reply.verdict.kind == BEST_EFFORT  # still no promise
    assert not old.changes
    assert len(admitted) < len(replies), "the load was meant to be too much"
    # Its turn comes after one patience in the queue and one in the engine; then memory must come free for it.
    assert took_s < 10 * PATIENCE_S


async def overload(stack: LocalStack, full: asyncio.Event, stop: asyncio.Event) -> list[Reply | BaseException]:
    """Requests faster than one replica can promise them, refused where they do not fit; `full` once one was."""
    calls: list[Call] = []
    while not stop.is_set():
        calls.append(Call(stack, firm(2000, 40, 100 + len(calls), 1500, on_infeasible=REJECT)))
        calls[-1].done.add_done_callback(lambda call: full.set() if call.exception() is not None else None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _BETWEEN_S)
        assert len(calls) < 900, "best effort starves"
    return await asyncio.gather(*(call.done for call in calls), return_exceptions=True)
