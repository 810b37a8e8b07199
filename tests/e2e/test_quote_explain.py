"""Quotes, explanations and retry delays on a fleet that is idle, and on one whose prefill is sold out for seconds."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import admission_pb2, types_pb2
from services.cli.stack import LocalStack
from services.client import Quote, Reason, SlosClient, SloServeError, Stage, rejected_verdict
from tests.e2e.calls import Reply, admission, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT_TOKENS = 8000  # about 0.6 s of prefill on the emulated GPU
URGENT_MS = 1500.0
LOAD_TTFT_MS = 4000.0
LOAD = 24  # four times what two replicas can prefill within that


def prompt(salt: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    return list(request(prompt_tokens=tokens, salt=salt).token_ids.ids)


def urgent(salt: int, **fields: object) -> admission_pb2.GenerateRequest:
    stage = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=URGENT_MS, tpot_ms=100)
    return request("", PROMPT_TOKENS, 4, stages=[stage], salt=salt, **fields)


async def quote(client: SlosClient, salt: int, ttft_ms: float = URGENT_MS, tokens: int = PROMPT_TOKENS) -> Quote:
    return await client.quote(prompt(salt, tokens), stages=[Stage(ttft_ms=ttft_ms, tpot_ms=100)], max_tokens=4)


@asynccontextmanager
async def sold_out(stack: LocalStack, client: SlosClient, salt: int) -> AsyncIterator[None]:
    """Both replicas have promised all of their prefill for the next seconds; what they refused is gone at once."""

    async def one(number: int, decided: asyncio.Event) -> bool:
        try:
            stream = client.generate(
                prompt(salt + number),
                stages=[Stage(ttft_ms=LOAD_TTFT_MS, tpot_ms=100)],
                max_tokens=4,
                ignore_eos=True,
                on_infeasible="REJECT",
            )
            async for _ in stream:
                decided.set()
            return True
        except SloServeError as error:
            assert error.reason is Reason.NO_CAPACITY, error
            return False
        finally:
            decided.set()

    decided = [asyncio.Event() for _ in range(LOAD)]
    running = [asyncio.create_task(one(number, event)) for number, event in enumerate(decided)]
    try:
        async with asyncio.timeout(30):
            for event in decided:
                await event.wait()
        assert not all(task.done() for task in running), "nothing was promised"
        yield
    finally:
        outcomes = await asyncio.gather(*running)
    assert True in outcomes and False in outcomes, f"the load must be more than fits: {outcomes}"


async def test_an_idle_fleet_fits_and_says_how_tight_it_could_be(emulated: LocalStack) -> None:
    async with SlosClient(emulated.admission_address) as client:
        found = await quote(client, 200)
    assert found.fits
    assert found.verdict.kind == "ADMITTED"
    assert found.verdict.replica_id in ("w0", "w1")
    assert 0 < found.verdict.predicted_ttft_ms <= URGENT_MS
    assert found.tightest_ttft_ms is not None
    assert 500 < found.tightest_ttft_ms < URGENT_MS  # 0.6 s of prefill and no queue
    assert found.tightest_tpot_ms == 50
    assert found.verdict.constraint is None


async def test_a_quote_leaves_nothing_behind(emulated: LocalStack) -> None:
    import redis.asyncio

    connection = redis.asyncio.from_url(emulated.redis_url)
    async with SlosClient(emulated.admission_address) as client:
        before = set(await connection.keys("slos:req:*"))
        quotes = await asyncio.gather(*(quote(client, 210 + number) for number in range(20)))
        assert set(await connection.keys("slos:req:*")) <= before
    await connection.aclose()
    assert all(found.fits for found in quotes)  # 20 x 0.6 s within 1.5 s, had any of them reserved its room


async def test_a_sold_out_fleet_says_no_why_what_else_and_when(emulated: LocalStack) -> None:
    async with SlosClient(emulated.admission_address) as client, sold_out(emulated, client, 240):
        asked_us = time.time_ns() // 1000
        found = await quote(client, 239)
        assert not found.fits
        assert found.verdict.constraint is not None
        assert found.verdict.constraint.kind == "PREFILL_BUDGET"
        assert found.verdict.constraint.needed > found.verdict.constraint.available >= 0
        assert f"{found.verdict.constraint.needed:.0f} tokens" in found.verdict.constraint.detail
        assert found.tightest_ttft_ms is not None
        assert found.tightest_ttft_ms > URGENT_MS
        assert found.earliest_us is not None
        assert asked_us < found.earliest_us < asked_us + 20_000_000
        looser = await quote(client, 239, ttft_ms=found.tightest_ttft_ms * 1.2)
        assert looser.fits, "what a quote calls the tightest must fit"


async def test_a_rejection_says_why_and_when_and_a_retry_then_is_promised(emulated: LocalStack) -> None:
    async with SlosClient(emulated.admission_address) as client, sold_out(emulated, client, 280):
        message = urgent(279, on_infeasible=types_pb2.ON_INFEASIBLE_REJECT)
        reply = Reply()
        async with admission(emulated.admission_address) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for event in stub.Generate(message, timeout=30):
                    reply.take(event)
            assert not reply.order
            delay_ms, verdict, request_id = rejection(caught.value)
            assert verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET
            assert verdict.constraint.needed > verdict.constraint.available
            assert verdict.hops == 2
            assert 0 < delay_ms < 20_000

            said = await client.explain(request_id)
            assert said.state == "rejected"
            assert said.verdict.constraint is not None
            assert said.verdict.constraint.detail == verdict.constraint.detail
            assert {hop.replica_id for hop in said.hops} == {"w0", "w1"}

            await asyncio.sleep(delay_ms / 1000)  # as a client that obeys the delay would
            async for event in stub.Generate(message, timeout=30):
                reply.take(event)
    assert reply.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED
    assert reply.finished is not None
    assert len(reply.ids) == 4


def rejection(error: grpc.aio.AioRpcError) -> tuple[float, types_pb2.Verdict, str]:
    """The retry delay in milliseconds, as details and trailer agree on it, the verdict, and the request's id."""
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(error)
    assert status is not None
    found: dict[str, object] = {}
    for detail in status.details:
        for kind in (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo, types_pb2.Verdict):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    retry, info, verdict = found["RetryInfo"], found["ErrorInfo"], found["Verdict"]
    delay_ms = retry.retry_delay.ToMicroseconds() / 1000
    trailers = dict(error.trailing_metadata() or ())
    assert int(trailers["grpc-retry-pushback-ms"]) == round(delay_ms)
    assert (info.reason, verdict.kind) == ("NO_CAPACITY", types_pb2.VERDICT_KIND_REJECTED)
    assert verdict.retry_after_ms == pytest.approx(delay_ms, abs=0.01)
    return delay_ms, verdict, info.metadata["request_id"]


async def test_a_deferred_request_is_explained_while_it_runs_and_after(emulated: LocalStack) -> None:
    async with SlosClient(emulated.admission_address) as client, sold_out(emulated, client, 320):
        stream = client.generate(
            prompt(319),
            stages=[Stage(ttft_ms=URGENT_MS, tpot_ms=100)],
            max_tokens=4,
            ignore_eos=True,
            request_id="explain-deferred",
        )
        first = await anext(stream)
        said = await client.explain("explain-deferred")
        assert said.verdict.kind == "BEST_EFFORT"
        assert said.verdict == first
        assert said.verdict.constraint is not None
        assert said.verdict.constraint.kind == "PREFILL_BUDGET"
        assert said.verdict.constraint.needed > said.verdict.constraint.available
        assert {hop.replica_id for hop in said.hops} == {"w0", "w1"}
        assert all(hop.verdict.constraint is not None for hop in said.hops)
        assert said.verdict.constraint.detail in said.why[0]
        events = [event async for event in stream]
        ended = await client.explain("explain-deferred")
    assert ended.state == "finished"
    assert ended.stages == events[-1].stages
    assert ended.stages[0].output_tokens == 4
    late = ended.stages[0].ttft_ms > URGENT_MS
    assert any("later than its TTFT" in sentence for sentence in ended.why) is late


async def test_a_request_whose_stream_is_gone_is_explained_from_its_record(emulated: LocalStack) -> None:
    async with SlosClient(emulated.admission_address) as client:
        reply = Reply()
        async with admission(emulated.admission_address) as stub:
            async for event in stub.Generate(urgent(360), timeout=30):
                reply.take(event)
        async with asyncio.timeout(10):
            while (said := await client.explain(reply.request_id)).state != "finished":  # noqa: ASYNC110 - of a worker
                await asyncio.sleep(0.02)
        assert reply.finished is not None
        assert said.verdict.kind == "ADMITTED"
        assert said.verdict.replica_id == reply.finished.replica_id
        assert said.verdict.predicted_ttft_ms == reply.verdict.predicted_ttft_ms
        assert said.hops[-1].verdict.kind == "ADMITTED"
        assert any("its first token left" in sentence for sentence in said.why)
        with pytest.raises(SloServeError) as unknown:
            await client.explain("never-sent")
        assert unknown.value.reason is Reason.REQUEST_UNKNOWN
        assert rejected_verdict(unknown.value) is None
