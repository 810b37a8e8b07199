"""A request of each application, through every real part, on both engines."""

import asyncio

import pytest

from protos import types_pb2
from services.cli.stack import LocalStack
from tests.e2e.calls import generate, request

pytestmark = pytest.mark.asyncio(loop_scope="session")

APPLICATIONS = {
    "chatbot": ["STAGE_KIND_ANSWER"],
    "coder": ["STAGE_KIND_ANSWER"],
    "summarizer": ["STAGE_KIND_ANSWER"],
    "tool-agent": ["STAGE_KIND_TOOL_CALL", "STAGE_KIND_ANSWER"],
    "reasoner": ["STAGE_KIND_THINK", "STAGE_KIND_ANSWER"],
}


def kinds(stages) -> list[str]:
    return [types_pb2.StageKind.Name(stage.kind) for stage in stages]


@pytest.mark.parametrize("application", APPLICATIONS)
async def test_application_is_promised_and_delivered_on_the_emulated_engine(
    emulated: LocalStack, application: str
) -> None:
    stages = APPLICATIONS[application]
    max_tokens = 300 if len(stages) == 2 else 20  # past the cap of the first stage
    reply = await generate(emulated.admission_address, request(application, 200, max_tokens, salt=1))
    assert reply.order[0] == "verdict"
    assert reply.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED
    assert reply.verdict.predicted_ttft_ms > 0
    assert reply.verdict.ttft_slo_ms >= 100
    assert len(reply.ids) == max_tokens
    assert reply.finished is not None
    assert kinds(reply.finished.stages) == stages
    assert sum(stage.output_tokens for stage in reply.finished.stages) == max_tokens
    assert reply.finished.reason == types_pb2.FINISH_REASON_LENGTH
    assert reply.finished.promised
    assert [end.stage_index for end in reply.stage_ends] == list(range(len(stages)))


@pytest.mark.vllm
@pytest.mark.parametrize("application", ["chatbot", "coder", "summarizer", "reasoner"])
async def test_application_runs_on_real_vllm(cpu_vllm: LocalStack, application: str) -> None:
    reply = await generate(cpu_vllm.admission_address, request(application, 64, 24, salt=2), timeout_s=120)
    assert reply.verdict.kind in (types_pb2.VERDICT_KIND_ADMITTED, types_pb2.VERDICT_KIND_BEST_EFFORT)
    assert len(reply.ids) == 24
    assert reply.text
    assert reply.finished is not None
    assert reply.finished.output_tokens == 24
    assert reply.finished.prompt_tokens == 64


@pytest.mark.vllm
async def test_greedy_output_of_real_vllm_is_the_same_for_text_and_ids(cpu_vllm: LocalStack) -> None:
    one, two = await asyncio.gather(
        *(
            generate(
                cpu_vllm.admission_address,
                request(text="Return a list of the words in the string", token_ids=None, max_tokens=16),
            )
            for _ in range(2)
        )
    )
    assert one.ids == two.ids
    assert one.text == two.text


async def test_explicit_stages_need_no_application(emulated: LocalStack) -> None:
    stage = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=900, tpot_ms=75)
    reply = await generate(emulated.admission_address, request("", 100, 8, stages=[stage], salt=3))
    assert reply.verdict.kind == types_pb2.VERDICT_KIND_ADMITTED
    assert reply.verdict.ttft_slo_ms == 900
    assert reply.verdict.tier == "tight"  # the loosest tier that meets 75 ms is the one of 50 ms


async def test_stop_string_ends_the_text_before_it(emulated: LocalStack) -> None:
    whole = await generate(emulated.admission_address, request("chatbot", 64, 24, salt=4))
    stop = whole.text[len(whole.text) // 2 :][:4]
    sampling = types_pb2.Sampling(max_tokens=24, temperature=0.0, ignore_eos=True, stop=[stop])
    cut = await generate(emulated.admission_address, request("chatbot", 64, sampling=sampling, salt=4))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finished is not None
    assert cut.finished.reason == types_pb2.FINISH_REASON_STOP
