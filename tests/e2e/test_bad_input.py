"""Bad input gets the status, the field and the reason the contract names, and costs nothing."""

import math

import grpc
import pytest
import redis.asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import admission_pb2, types_pb2
from services.cli.stack import LocalStack
from tests.e2e.calls import Reply, admission, generate, request

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def refused(stack: LocalStack, message: admission_pb2.GenerateRequest) -> tuple[grpc.StatusCode, str, set[str]]:
    """Status code, ErrorInfo reason and violated fields of a call that must fail before any event."""
    reply = Reply()
    async with admission(stack.admission_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in stub.Generate(message, timeout=30):
                reply.take(event)
    assert not reply.order, "a refused request must not get any event"
    status = rpc_status.from_call(caught.value)
    assert status is not None, f"no details: {caught.value}"
    reason, fields = "", set()
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info):
            reason = info.reason
        if detail.Unpack(bad):
            fields = {violation.field for violation in bad.field_violations}
    return caught.value.code(), reason, fields


def sampling(**fields: object) -> types_pb2.Sampling:
    return types_pb2.Sampling(**{"max_tokens": 4, **fields})


def stage(**fields: object) -> types_pb2.StageSpec:
    return types_pb2.StageSpec(**{"kind": types_pb2.STAGE_KIND_ANSWER, "ttft_ms": 500, "tpot_ms": 100, **fields})


MALFORMED = {
    "empty text": (request(text="", token_ids=None), "text"),
    "no prompt": (admission_pb2.GenerateRequest(application="chatbot"), "prompt"),
    "empty ids": (request(token_ids=admission_pb2.TokenIds()), "token_ids.ids"),
    "id outside the vocabulary": (request(token_ids=admission_pb2.TokenIds(ids=[1, 10**6])), "token_ids.ids[1]"),
    "over-long prompt": (request(prompt_tokens=40_000), "token_ids.ids"),
    "max_tokens beyond the context": (request(sampling=sampling(max_tokens=10**6)), "sampling.max_tokens"),
    "max_tokens of zero": (request(sampling=sampling(max_tokens=0)), "sampling.max_tokens"),
    "negative temperature": (request(sampling=sampling(temperature=-1)), "sampling.temperature"),
    "temperature that is no number": (request(sampling=sampling(temperature=math.nan)), "sampling.temperature"),
    "top_p above one": (request(sampling=sampling(top_p=1.5)), "sampling.top_p"),
    "empty stop string": (request(sampling=sampling(stop=[""])), "sampling.stop[0]"),
    "unknown application": (request("no-such-app"), "application"),
    "neither application nor stages": (request(""), "application"),
    "negative TTFT": (request("", stages=[stage(ttft_ms=-5)]), "stages[0].ttft_ms"),
    "TPOT of zero": (request("", stages=[stage(tpot_ms=0)]), "stages[0].tpot_ms"),
    "TPOT that is no number": (request("", stages=[stage(tpot_ms=math.nan)]), "stages[0].tpot_ms"),
    "infinite TTFT": (request("", stages=[stage(ttft_ms=math.inf)]), "stages[0].ttft_ms"),
    "slowdown below one": (
        request("", stages=[types_pb2.StageSpec(kind=3, ttft_slowdown=0.5, tpot_ms=100)]),
        "stages[0].ttft_slowdown",
    ),
    "first stage without TTFT": (request("", stages=[types_pb2.StageSpec(kind=3, tpot_ms=100)]), "stages[0].ttft_ms"),
    "ids as a template": (request(templated=True), "templated"),
    "negative grace": (request(resume_grace_s=-1), "resume_grace_s"),
    "request id with a blank": (request(request_id="not ok"), "request_id"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_input_names_the_field(emulated: LocalStack, name: str) -> None:
    message, field = MALFORMED[name]
    code, reason, fields = await refused(emulated, message)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason == "INVALID_FIELD"
    assert fields == {field}


async def test_all_violations_come_together(emulated: LocalStack) -> None:
    message = request("no-such-app", sampling=sampling(temperature=-1, top_p=2))
    _, _, fields = await refused(emulated, message)
    assert fields == {"application", "sampling.temperature", "sampling.top_p"}


@pytest.mark.parametrize("spec", [stage(tpot_ms=1), stage(ttft_ms=0.5)], ids=["tpot", "ttft"])
async def test_slo_no_idle_replica_could_meet_is_a_failed_precondition(
    emulated: LocalStack, spec: types_pb2.StageSpec
) -> None:
    code, reason, _ = await refused(emulated, request("", 400, stages=[spec]))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert reason == "SLO_IMPOSSIBLE"


async def test_same_request_id_with_another_body_is_a_conflict(emulated: LocalStack) -> None:
    await generate(emulated.admission_address, request(request_id="conflict-1", salt=60))
    code, reason, _ = await refused(emulated, request(request_id="conflict-1", salt=61))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert reason == "REQUEST_CONFLICT"


async def test_same_request_id_with_the_same_body_replays(emulated: LocalStack) -> None:
    first = await generate(emulated.admission_address, request(request_id="retry-1", salt=62))
    again = await generate(emulated.admission_address, request(request_id="retry-1", salt=62))
    assert again.ids == first.ids
    assert again.finished == first.finished


async def test_message_over_the_size_limit_is_refused(emulated: LocalStack) -> None:
    async with admission(emulated.admission_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(request(text="x" * (5 << 20), token_ids=None), timeout=30):
                pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_text_that_is_not_utf8_is_refused(emulated: LocalStack) -> None:
    wire = request(text="abcd", token_ids=None).SerializeToString().replace(b"abcd", b"\xff\xfe\xfd\xfc")
    async with grpc.aio.insecure_channel(emulated.admission_address) as channel:
        raw = channel.unary_stream(
            "/slosserve.v1.Admission/Generate",
            request_serializer=lambda payload: payload,
            response_deserializer=admission_pb2.GenerateEvent.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in raw(wire, timeout=30):
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "text" in str(caught.value.details())


async def test_refused_requests_leave_nothing_behind(emulated: LocalStack) -> None:
    await refused(emulated, request("no-such-app", request_id="left-behind-1"))
    connection = redis.asyncio.from_url(emulated.redis_url)
    try:
        assert not await connection.exists("slos:req:left-behind-1")
    finally:
        await connection.aclose()
