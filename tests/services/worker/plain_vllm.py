"""What vLLM's own scheduler generates with the bundled model: the outputs that the hook must not change."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from services.worker.engine_environment import prepare_environment
from services.worker.engine_settings import EngineSettings

__all__ = ["MODEL", "plain_outputs_of"]

MODEL = str(Path(__file__).parents[3] / "models" / "tiny")


async def plain_outputs_of(workload: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """Greedy outputs in float32, on one thread, of (prompt, output tokens)."""
    prepare_environment(EngineSettings(engine="vllm", model=MODEL, data_dir=Path(), cpu_threads=1))
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.inputs.engine import tokens_input
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=MODEL, dtype="float32", max_model_len=2048, max_num_seqs=16, skip_tokenizer_init=True, enforce_eager=True,
        kv_cache_memory_bytes=1 << 28, disable_log_stats=True,
    )  # fmt: skip

    async def run(llm: AsyncLLM, index: int, prompt: list[int], output_tokens: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        final = None
        async for output in llm.generate(tokens_input(prompt), params, f"plain{index}"):
            final = output
        assert final is not None
        return list(final.outputs[0].token_ids)

    llm = AsyncLLM.from_engine_args(arguments)
    outputs = await asyncio.gather(*(run(llm, i, prompt, count) for i, (prompt, count) in enumerate(workload)))
    await asyncio.to_thread(llm.shutdown)
    del llm
    return outputs
