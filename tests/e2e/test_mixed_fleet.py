"""Two kinds of emulated hardware in one fleet, two routers, two planners."""

import asyncio
from pathlib import Path

import pytest

from protos import admission_pb2, types_pb2
from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec
from services.core.presets import preset
from tests.e2e.calls import Reply, generate, request

FAST, SLOW = preset("qwen2.5-7b-a100"), preset("opt-30b-a100")
ADMITTED = types_pb2.VERDICT_KIND_ADMITTED


def own_slo(prompt_tokens: int, salt: int, **ttft: float) -> admission_pb2.GenerateRequest:
    stage = types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, tpot_ms=100, **ttft)
    return request("", prompt_tokens, 8, salt=salt, stages=[stage])


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_each_replica_is_planned_as_the_hardware_it_is(tmp_path: Path) -> None:
    spec = StackSpec(
        data_dir=tmp_path,
        engine="emulated",
        num_workers=2,
        num_routers=2,
        num_planners=2,
        service_environment={"worker-0": {"SLOS_PRESET": FAST.name}, "worker-1": {"SLOS_PRESET": SLOW.name}},
    )
    async with LocalStack(spec) as stack:
        address = stack.admission_address
        fast_s, slow_s = (hardware.model.zero_load_prefill_s(3000) for hardware in (FAST, SLOW))
        assert slow_s > 1.5 * fast_s

        # a slowdown is of the fastest replica registered, once admission knows both; only that one can be in time
        async with asyncio.timeout(30):
            slowdown = await generate(address, own_slo(3000, 1, ttft_slowdown=1.6))
            while slowdown.verdict.ttft_slo_ms > 1600 * 0.9 * slow_s:
                slowdown = await generate(address, own_slo(3000, 1, ttft_slowdown=1.6))
        assert slowdown.verdict.ttft_slo_ms == pytest.approx(1600 * fast_s, rel=0.02)
        assert (slowdown.verdict.kind, slowdown.finished.replica_id) == (ADMITTED, "w0")

        # what the slow one can do in time goes there as well once the fast one is full
        replies = await asyncio.gather(
            *(generate(address, own_slo(3000, 10 + index, ttft_ms=1000 * (slow_s + 0.25))) for index in range(6))
        )
        kept: list[Reply] = [reply for reply in replies if reply.verdict.kind == ADMITTED]
        assert {reply.finished.replica_id for reply in kept} == {"w0", "w1"}
        on_slow = [reply for reply in kept if reply.finished.replica_id == "w1"]
        assert all(reply.verdict.predicted_ttft_ms >= 1000 * slow_s for reply in on_slow)
