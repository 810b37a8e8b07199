"""Pending requests, end to end on the emulated engine: decided by their replica, no later than their first token."""

import asyncio

import grpc.aio
import pytest
import redis.asyncio

from protos import admission_pb2, types_pb2
from services.cli.stack import LocalStack
from services.common.errors import Reason, from_rpc_error
from tests.e2e.calls import Reply, generate, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

PENDING, ADMITTED, BEST_EFFORT = (
    types_pb2.VERDICT_KIND_PENDING,
    types_pb2.VERDICT_KIND_ADMITTED,
    types_pb2.VERDICT_KIND_BEST_EFFORT,
)
TTFT_MS = 2500.0
SLACK_MS = 500.0  # what a busy test machine may add between the engine's step and the client
PROMPT_TOKENS = 1900
BURST = 60  # 60 x 1900 tokens are some 4 s of prefill on each of the two replicas


def long_prompt(salt: int, **fields: object) -> admission_pb2.GenerateRequest:
    stage = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=TTFT_MS, tpot_ms=100)
    return request("chatbot", PROMPT_TOKENS, 8, stages=[stage], salt=salt, **fields)


def kinds(reply: Reply) -> list[int]:
    return [verdict.kind for verdict in reply.verdicts]


def decided_in_time(reply: Reply) -> bool:
    """Whether every verdict came before the first token."""
    return "verdict" not in reply.order[reply.order.index("tokens") :]


async def test_a_burst_of_long_prompts_is_pending_until_its_replicas_decide(emulated: LocalStack) -> None:
    replies = await asyncio.gather(
        *(generate(emulated.admission_address, long_prompt(600 + index), 120.0) for index in range(BURST))
    )
    # An idle replica may decide before the placement's answer is back: then the decision is all there is to tell.
    assert {tuple(kinds(reply)) for reply in replies} <= {(PENDING, ADMITTED), (PENDING, BEST_EFFORT), (ADMITTED,)}
    assert sum(kinds(reply)[0] == PENDING for reply in replies) > BURST // 2
    assert all(decided_in_time(reply) for reply in replies)
    admitted = [reply for reply in replies if reply.verdict.kind == ADMITTED]
    deferred = [reply for reply in replies if reply.verdict.kind == BEST_EFFORT]
    assert len(admitted) + len(deferred) == BURST
    assert admitted, "two idle replicas can promise some"
    assert deferred, "the burst was meant to be too much"
    for reply in admitted:
        assert reply.finished is not None
        assert reply.finished.promised
        assert reply.verdict.replica_id == reply.finished.replica_id
    first_tokens_ms = sorted(reply.finished.stages[0].ttft_ms for reply in admitted if reply.finished is not None)
    assert first_tokens_ms[-1] <= TTFT_MS + SLACK_MS, [round(ms) for ms in first_tokens_ms]
    for reply in deferred:
        assert reply.finished is not None
        assert not reply.finished.promised
        assert reply.verdict.constraint.kind == types_pb2.CONSTRAINT_KIND_HOPELESS
        assert len(reply.ids) == 8


async def test_the_record_of_a_pending_request_follows_its_decision(emulated: LocalStack) -> None:
    reply = await generate(emulated.admission_address, long_prompt(700))
    assert kinds(reply) in ([PENDING, ADMITTED], [ADMITTED])
    assert reply.verdict.predicted_ttft_ms > 0
    connection = redis.asyncio.from_url(emulated.redis_url)
    try:
        assert await connection.hget(f"slos:req:{reply.request_id}", "verdict") == b"admitted"
    finally:
        await connection.aclose()


async def test_a_cheap_prompt_is_promised_on_arrival(emulated: LocalStack) -> None:
    roomy = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=3000, tpot_ms=100)
    reply = await generate(emulated.admission_address, request("chatbot", 200, 8, salt=710, stages=[roomy]))
    assert kinds(reply) == [ADMITTED]


async def test_who_takes_no_best_effort_never_sees_pending(emulated: LocalStack) -> None:
    async def outcome(salt: int) -> Reply | grpc.aio.AioRpcError:
        message = long_prompt(salt, on_infeasible=types_pb2.ON_INFEASIBLE_REJECT)
        reply = Reply()
        try:
            reply = await generate(emulated.admission_address, message, 120.0)
        except grpc.aio.AioRpcError as error:
            return error
        return reply

    outcomes = await asyncio.gather(*(outcome(800 + index) for index in range(BURST)))
    replies = [one for one in outcomes if isinstance(one, Reply)]
    refused = [from_rpc_error(one) for one in outcomes if not isinstance(one, Reply)]
    assert replies
    assert {tuple(kinds(reply)) for reply in replies} == {(ADMITTED,)}
    assert refused
    assert {error.reason for error in refused} == {Reason.NO_CAPACITY}
    assert all(error.retry_after_ms is not None and error.retry_after_ms > 0 for error in refused)
    raw = next(one for one in outcomes if not isinstance(one, Reply))
    assert "grpc-retry-pushback-ms" in {key for key, _ in raw.trailing_metadata()}
