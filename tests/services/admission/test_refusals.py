"""What clients send wrongly, as gRPC sees it: status, reason, fields. None of it reaches the router."""

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos import admission_pb2, types_pb2
from services.client import InvalidRequestError, Reason, SlosClient, SloServeError, Stage
from services.common.config import Catalogue, Tenant
from tests.services.admission.world import World, generate, soon


@pytest.fixture
def raw(world: World) -> Any:
    """Sends bytes as a GenerateRequest."""

    async def send(data: bytes) -> tuple[grpc.StatusCode, dict[str, str], str]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{world.admission.port}") as channel:
            method = channel.unary_stream("/slosserve.v1.Admission/Generate")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                [event async for event in method(data)]
        return refused.value.code(), _violations(refused.value), refused.value.details() or ""

    return send


def _violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    for detail in status.details if status else ():
        detail.Unpack(bad)
    return {violation.field: violation.description for violation in bad.field_violations}


async def test_text_that_is_not_utf8_names_its_field(raw: Any) -> None:
    code, violations, _ = await raw(b"\x12\x03a\xffb" + b"\x22\x07chatbot")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert violations == {"text": "not UTF-8: byte 1 is invalid start byte"}


async def test_a_bad_string_deep_inside_names_its_path(raw: Any) -> None:
    stop = b"\x2a\x02\xc3\x28"
    code, violations, _ = await raw(b"\x32" + bytes([len(stop)]) + stop)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations) == ["sampling.stop"]


async def test_bytes_that_are_no_message_are_called_so(raw: Any) -> None:
    code, _, text = await raw(b"\xff\xff\xff")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "slosserve.v1.GenerateRequest" in text


async def test_a_message_over_the_size_limit_is_refused_by_grpc(raw: Any) -> None:
    code, _, text = await raw(generate(text="x" * 5_000_000).SerializeToString())
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text


async def test_every_violation_comes_back_and_nothing_is_placed(world: World) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await anext(world.client.generate("", application="chess", temperature=7))
    assert {violation.field for violation in refused.value.violations} == {
        "text",
        "application",
        "sampling.temperature",
    }
    assert refused.value.reason is Reason.INVALID_FIELD
    assert not world.router.place_requests
    assert not await world.redis.keys("slos:req:*")


async def test_an_slo_beyond_any_idle_replica_must_not_be_retried(world: World) -> None:
    with pytest.raises(SloServeError, match=r"TTFT 1 ms: the fastest replica \(w0\) needs") as refused:
        await anext(world.client.generate("Go.", stages=[Stage(ttft_ms=1, tpot_ms=100)]))
    assert refused.value.reason is Reason.SLO_IMPOSSIBLE
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(SloServeError, match="tighter than the tightest tier") as refused:
        await anext(world.client.generate("Go.", stages=[Stage(ttft_ms=900, tpot_ms=20)]))
    assert refused.value.reason is Reason.SLO_IMPOSSIBLE


async def test_without_a_live_replica_the_answer_is_unavailable(world: World) -> None:
    await world.worker.die()
    await soon(lambda: not world.admission.replicas)
    with pytest.raises(SloServeError) as refused:
        await anext(world.client.generate("Go.", application="chatbot"))
    assert refused.value.reason is Reason.NO_REPLICA
    assert refused.value.retry_after_ms
    assert not world.router.place_requests


async def test_the_replicas_context_counts_too(world: World) -> None:
    ids = [50] * 4096  # the model could, the replica runs with less
    with pytest.raises(InvalidRequestError, match="context of 4096"):
        await anext(world.client.generate(ids, application="chatbot"))


async def test_an_absent_router_is_unavailable_and_named(world: World) -> None:
    lonely = await world.start_admission(routers="127.0.0.1:1")
    async with SlosClient(f"127.0.0.1:{lonely.port}") as client:
        with pytest.raises(SloServeError, match="no router answered") as refused:
            await anext(client.generate("Go.", application="chatbot"))
    assert refused.value.reason is Reason.ROUTER_UNAVAILABLE
    assert refused.value.retry_after_ms


async def test_the_second_router_serves_where_the_first_is_gone(world: World) -> None:
    both = await world.start_admission(routers=f"127.0.0.1:1,{world.router.address}")
    async with SlosClient(f"127.0.0.1:{both.port}") as client:
        for number in range(3):
            stream = client.generate("Go.", application="chatbot", request_id=f"two-{number}")
            await anext(stream)
            await stream.aclose()
    assert len(world.router.placed) == 3


async def test_keys_name_tenants_and_tenants_have_limits(world: World, catalogue: Catalogue) -> None:
    tenants = {"gold": Tenant(key="gold-key-1"), "free": Tenant(key="free-key-1", min_tpot_ms=80)}
    keyed = await world.start_admission(catalogue.model_copy(update={"tenants": tenants}))
    address = f"127.0.0.1:{keyed.port}"
    async with (
        SlosClient(address) as nobody,
        SlosClient(address, key="gold-key-1") as gold,
        SlosClient(address, key="free-key-1") as free,
    ):
        with pytest.raises(SloServeError) as unknown:
            await anext(nobody.generate("Go.", application="coder"))
        assert unknown.value.code is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(SloServeError) as forbidden:
            await anext(free.generate("Go.", application="coder"))
        assert forbidden.value.code is grpc.StatusCode.PERMISSION_DENIED
        stream = gold.generate("Go.", application="coder", request_id="t-1", resume_grace_s=30)
        await anext(stream)
        assert world.router.placed[0].tenant == "gold"
        for call in (free.cancel("t-1"), anext(free.resume("t-1"))):
            with pytest.raises(SloServeError) as hidden:
                await call
            assert hidden.value.reason is Reason.REQUEST_UNKNOWN


async def test_unknown_fields_of_newer_clients_do_no_harm(world: World) -> None:
    data = generate(request_id="new-1").SerializeToString() + b"\xf8\x07\x01"  # field 127
    async with grpc.aio.insecure_channel(f"127.0.0.1:{world.admission.port}") as channel:
        call = channel.unary_stream("/slosserve.v1.Admission/Generate")(data)
        first = admission_pb2.GenerateEvent.FromString(await anext(aiter(call)))
        call.cancel()
    assert first.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED
