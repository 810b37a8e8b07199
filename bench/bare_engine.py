"""vLLM as it is: AsyncLLM with its own scheduler over the emulated executor, nothing of ours around it.

The baseline that the services are measured against in the same run.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from services.core.presets import preset
from services.core.slo import BEST_EFFORT, StageKind, StageSlo
from services.core.view import PlanSettings
from services.worker.engine_api import SamplingSpec, Submission
from services.worker.engine_arguments import emulated_arguments, special_ids_of
from services.worker.engine_environment import prepare_environment
from services.worker.engine_settings import EngineSettings
from services.worker.hash_tokens import digest_of
from services.worker.hook_config import EmulationTerms, HookConfig, model_terms
from services.worker.request_terms import terms_of, to_extra_args

__all__ = ["BareEngine"]


class BareEngine:
    """An async context manager around one plain engine."""

    def __init__(self, model: str, preset_name: str, vocab_size: int) -> None:
        self._model, self._preset, self._vocab_size = model, preset(preset_name), vocab_size
        self._folder = tempfile.TemporaryDirectory(prefix="slos-bare-")
        self._llm: Any = None

    async def __aenter__(self) -> Self:
        """Start the engine process."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = EngineSettings(
            engine="emulated", model=self._model, preset=self._preset.name, data_dir=Path(self._folder.name)
        )
        prepare_environment(settings)
        terms = model_terms(self._preset.model)
        emulation = EmulationTerms(terms, self._vocab_size, special_ids_of(self._model))
        hook = HookConfig("", PlanSettings(), terms, emulation=emulation)
        arguments = emulated_arguments(settings, hook, self._preset)
        del arguments["scheduler_cls"]
        config = AsyncEngineArgs(**arguments).create_engine_config()
        self._llm = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, disable_log_stats=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._llm.output_handler.cancel()
        await asyncio.to_thread(self._llm.shutdown)
        self._folder.cleanup()

    async def generate(self, request_id: str, prompt_ids: tuple[int, ...], max_tokens: int) -> AsyncIterator[int]:
        """Run one request; yields the number of new tokens of each engine step."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        submission = Submission(
            request_id=request_id,
            attempt=1,
            application="",
            token_ids=prompt_ids,
            delivered_tokens=0,
            prompt_digest=digest_of(prompt_ids),
            sampling=SamplingSpec(max_tokens),
            stages=(StageSlo(StageKind.ANSWER, 1.0, None, 1.0, max_tokens),),
            tiers=(BEST_EFFORT,),
            promised=False,
            ttft_deadline_s=0.0,
            arrival_s=0.0,
            forecast_tokens=max_tokens,
        )
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=to_extra_args(terms_of(submission)),
        )
        async for output in self._llm.generate(tokens_input(list(prompt_ids)), params, request_id):
            yield len(output.outputs[0].token_ids)
