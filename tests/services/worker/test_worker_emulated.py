"""The worker around a real engine: vLLM with the emulated executor."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from protos import types_pb2, worker_pb2
from services.worker.vllm_engine import VllmEngine
from tests.services.worker.worker_world import eventually, running_world

pytestmark = pytest.mark.vllm


async def test_requests_of_both_kinds_run_together_and_a_cancel_frees_their_blocks(
    redis: Redis, redis_url: str, unique: str, tmp_path: Path
) -> None:
    settings = {"engine": "emulated", "kv_blocks": 400, "max_model_len": 2048, "max_num_seqs": 64}
    async with running_world(
        redis, redis_url, unique, tmp_path, lambda settings: VllmEngine(settings.engine_settings()), **settings
    ) as world:
        total_blocks = world.engine.info.total_blocks
        names = [f"{unique}-{number}" for number in range(8)]
        for number, name in enumerate(names):
            kind = {} if number % 2 else {"promised": False, "tier": "best-effort"}
            request = world.request(name, max_tokens=20, prompt_token_ids=[50 + number] * 40, **kind)
            request.sampling.ignore_eos = True
            await world.submit(request)
        for name in names:
            assert (await world.listener.end(name)).finish_reason == types_pb2.FINISH_REASON_LENGTH
            assert len(world.listener.ids[name]) == 20
            await world.until_recorded(name, state="finished", output_tokens="20")
            first = world.listener.chunks[name][0]
            assert 0 < first.scheduled_at_us <= first.emitted_at_us

        long = f"{unique}-long"
        request = world.request(long, max_tokens=1500, prompt_token_ids=[9] * 40)
        request.sampling.ignore_eos = True
        await world.submit(request)
        await world.listener.tokens(long, 3)
        assert (await world.stub.Status(worker_pb2.StatusRequest())).free_blocks < total_blocks
        await world.stub.Cancel(worker_pb2.WorkerCancelRequest(request_id=long, reason="client"))
        end = await world.listener.end(long)
        assert end.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        await world.until_lease(free_blocks=str(total_blocks), running="0")
        await eventually(lambda: any(state.finished for state in world.planner.states))
