"""Cancel, client deadlines, lost streams and Resume."""

import asyncio

import grpc
import pytest

from protos import admission_pb2, types_pb2, worker_pb2, worker_pb2_grpc
from services.cli.stack import LocalStack
from tests.e2e.calls import Reply, admission, generate, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

LONG = 20_000  # tokens: minutes of decoding


async def wait_idle(stack: LocalStack, timeout_s: float = 15.0) -> None:
    """Return once no worker runs anything and every KV block is free."""

    async def idle(address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            while True:
                status = await stub.Status(worker_pb2.StatusRequest())
                if status.running == 0 and status.waiting == 0 and status.free_blocks == status.total_blocks:
                    return
                await asyncio.sleep(0.05)

    async with asyncio.timeout(timeout_s):
        await asyncio.gather(*(idle(address) for address in stack.addresses.worker))


async def read_tokens(call, count: int) -> Reply:
    reply = Reply()
    async for event in call:
        reply.take(event)
        if len(reply.ids) >= count:
            break
    return reply


async def test_cancel_ends_the_request_and_frees_its_blocks(emulated: LocalStack) -> None:
    async with admission(emulated.admission_address) as stub:
        call = stub.Generate(request("chatbot", 300, LONG, request_id="cancel-1", salt=70), timeout=60)
        reply = await read_tokens(call, 3)
        answer = await stub.Cancel(admission_pb2.CancelRequest(request_id="cancel-1"))
        assert answer.cancelled
        async for event in call:
            reply.take(event)
        assert reply.finished is not None
        assert reply.finished.reason == types_pb2.FINISH_REASON_CANCELLED
        again = await stub.Cancel(admission_pb2.CancelRequest(request_id="cancel-1"))
        assert not again.cancelled
    await wait_idle(emulated)


async def test_cancel_of_an_unknown_request_is_not_found(emulated: LocalStack) -> None:
    async with admission(emulated.admission_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Cancel(admission_pb2.CancelRequest(request_id="nobody-knows-me"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_lost_stream_without_grace_frees_the_blocks(emulated: LocalStack) -> None:
    async with admission(emulated.admission_address) as stub:
        call = stub.Generate(request("chatbot", 300, LONG, salt=71), timeout=60)
        await read_tokens(call, 3)
        call.cancel()
    await wait_idle(emulated)


async def test_passed_client_deadline_ends_the_call_and_frees_the_blocks(emulated: LocalStack) -> None:
    async with admission(emulated.admission_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(request("chatbot", 300, LONG, salt=72), timeout=1.0):
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await wait_idle(emulated)


async def test_resume_continues_without_a_lost_or_repeated_token(emulated: LocalStack) -> None:
    message = request("chatbot", 100, 60, request_id="resume-1", resume_grace_s=20, salt=73)
    whole = await generate(emulated.admission_address, request("chatbot", 100, 60, salt=73))
    async with admission(emulated.admission_address) as stub:
        call = stub.Generate(message, timeout=60)
        first = await read_tokens(call, 10)
        call.cancel()
        rest = Reply(ids=list(first.ids), text=first.text)
        resumed = stub.Resume(admission_pb2.ResumeRequest(request_id="resume-1", from_token=len(first.ids)), timeout=60)
        async for event in resumed:
            rest.take(event)
    assert rest.ids == whole.ids
    assert rest.text == whole.text
    assert rest.finished is not None
    assert rest.finished.output_tokens == 60


async def test_resume_of_a_finished_request_replays_from_any_token(emulated: LocalStack) -> None:
    whole = await generate(emulated.admission_address, request(request_id="resume-2", resume_grace_s=5, salt=74))
    tail: list[int] = []
    async with admission(emulated.admission_address) as stub:
        async for event in stub.Resume(admission_pb2.ResumeRequest(request_id="resume-2", from_token=5), timeout=30):
            if event.WhichOneof("event") == "tokens":
                tail.extend(event.tokens.ids)
    assert tail == whole.ids[5:]


@pytest.mark.parametrize(
    ("request_id", "from_token", "code"),
    [
        ("never-seen", 0, grpc.StatusCode.NOT_FOUND),
        ("resume-3", 1000, grpc.StatusCode.OUT_OF_RANGE),
    ],
)
async def test_resume_that_cannot_be_is_refused(
    emulated: LocalStack, request_id: str, from_token: int, code: grpc.StatusCode
) -> None:
    await generate(emulated.admission_address, request(request_id="resume-3", resume_grace_s=5, salt=75))
    async with admission(emulated.admission_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Resume(
                admission_pb2.ResumeRequest(request_id=request_id, from_token=from_token), timeout=30
            ):
                pass
    assert caught.value.code() is code


@pytest.mark.vllm
async def test_cancel_frees_the_blocks_of_real_vllm(cpu_vllm: LocalStack) -> None:
    async with admission(cpu_vllm.admission_address) as stub:
        call = stub.Generate(request("chatbot", 64, 4000, salt=76), timeout=120)
        await read_tokens(call, 3)
        call.cancel()
    await wait_idle(cpu_vllm, timeout_s=30)
