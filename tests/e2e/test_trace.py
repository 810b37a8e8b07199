"""One trace per request over all four services, and the standard metrics."""

import asyncio
import json
import sys

import pytest

from services.cli.stack import LocalStack
from tests.e2e.calls import generate, request
from tests.e2e.otlp_sink import OtlpSink

pytestmark = pytest.mark.asyncio(loop_scope="session")

OWNERS = {
    "request": "slos-serve-admission",
    "admit": "slos-serve-admission",
    "tokenise": "slos-serve-admission",
    "deliver": "slos-serve-admission",
    "route": "slos-serve-router",
    "plan": "slos-serve-planner",
    "queue": "slos-serve-worker",
    "prefill": "slos-serve-worker",
    "decode THINK": "slos-serve-worker",
    "decode ANSWER": "slos-serve-worker",
    "llm_request": "slos-serve-worker",  # vLLM's own
}


async def test_one_trace_holds_every_stage_of_a_request(emulated: LocalStack, otlp_sink: OtlpSink) -> None:
    message = request("reasoner", max_tokens=280, text="Return the sum of a and b.", token_ids=None)
    reply = await generate(emulated.admission_address, message)
    assert reply.finished is not None
    spans = await otlp_sink.wait_for(reply.finished.trace_id, set(OWNERS))
    by_name = {span.name: (service, span) for service, span in spans}
    for name, owner in OWNERS.items():
        assert by_name[name][0] == owner, name
    assert any(span.name.startswith("hop ") for _, span in spans)
    ids = {span.span_id for _, span in spans}
    roots = [span.name for _, span in spans if span.parent_span_id not in ids]
    assert len(roots) == 1, f"one tree, not {roots}"
    order = ["queue", "prefill", "decode THINK", "decode ANSWER"]
    starts = [by_name[name][1].start_time_unix_nano for name in order]
    assert starts == sorted(starts)
    ends = [by_name[name][1].end_time_unix_nano for name in order]
    assert all(end >= start for start, end in zip(starts, ends, strict=True))


async def test_genai_metrics_arrive_under_their_standard_names(emulated: LocalStack, otlp_sink: OtlpSink) -> None:
    await generate(emulated.admission_address, request(salt=80))
    await otlp_sink.wait_for_metrics(
        {
            "gen_ai.server.time_to_first_token",
            "gen_ai.server.time_per_output_token",
            "gen_ai.server.request.duration",
        }
    )


@pytest.mark.vllm
async def test_without_an_endpoint_traces_are_local_files(cpu_vllm: LocalStack) -> None:
    message = request("chatbot", max_tokens=8, text="Return the sum of a and b.", token_ids=None)
    reply = await generate(cpu_vllm.admission_address, message, timeout_s=120)
    assert reply.finished is not None
    trace_id = reply.finished.trace_id
    traces = cpu_vllm.spec.data_dir / "traces"

    def written() -> set[str]:
        lines = [line for path in traces.glob("*.jsonl") for line in path.read_text().splitlines() if trace_id in line]
        return {json.loads(line)["name"] for line in lines}

    async with asyncio.timeout(20):
        # files have no event to await
        while not {"request", "plan", "prefill", "decode ANSWER"} <= written():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "trace", trace_id, "--data-dir", str(cpu_vllm.spec.data_dir)),
        stdout=asyncio.subprocess.PIPE,
    )
    shown, _ = await process.communicate()
    assert process.returncode == 0
    for name in ("request", "tokenise", "plan", "prefill", "decode ANSWER"):
        assert name in shown.decode()
