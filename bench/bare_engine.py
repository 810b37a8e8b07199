"""vLLM as it is: AsyncLLM with its own scheduler, nothing of ours around it.

The baseline that the services are measured against in the same run: the same model, memory and limits, over the real
executor or the emulated one.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from services.core.presets import preset
from services.core.slo import BEST_EFFORT, StageKind, StageSlo
from services.core.view import PlanSettings
from services.worker.engine_api import SamplingSpec, Submission
from services.worker.engine_arguments import emulated_arguments, special_ids_of, vllm_arguments
from services.worker.engine_environment import keep_freed_memory, prepare_environment
from services.worker.engine_settings import EngineSettings
from services.worker.hash_tokens import digest_of
from services.worker.hook_config import EmulationTerms, HookConfig, model_terms
from services.worker.request_terms import terms_of, to_extra_args

__all__ = ["BareEngine"]


class BareEngine:
    """An async context manager around one plain engine. `settings.data_dir` is not used."""

    def __init__(self, settings: EngineSettings, vocab_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slos-bare-")
        self._settings = replace(settings, data_dir=Path(self._folder.name))
        self._vocab_size = vocab_size
        self._llm: Any = None

    async def __aenter__(self) -> Self:
        """Start the engine process."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        prepare_environment(self._settings)
        config = AsyncEngineArgs(**self._arguments()).create_engine_config(UsageContext.OPENAI_API_SERVER)
        if self._settings.engine == "emulated" and self._settings.async_scheduling:
            config.scheduler_config.async_scheduling = True  # as the worker does
        self._llm = await asyncio.to_thread(AsyncLLM.from_vllm_config, config, disable_log_stats=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._llm.output_handler.cancel()
        await asyncio.to_thread(self._llm.shutdown)
        self._llm = None
        self._folder.cleanup()

    @property
    def process_ids(self) -> list[int]:
        """This process, in which AsyncLLM runs; its children are the engine."""
        return [os.getpid()]

    async def generate(
        self, request_id: str, prompt_ids: tuple[int, ...], max_tokens: int
    ) -> AsyncIterator[tuple[int, ...]]:
        """Run one request; yields the new token ids of each engine step."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=self._extra_args(request_id, prompt_ids, max_tokens),
        )
        async for output in self._llm.generate(tokens_input(list(prompt_ids)), params, request_id):
            yield tuple(output.outputs[0].token_ids)

    def _arguments(self) -> dict[str, Any]:
        """The worker's arguments without its scheduler."""
        settings = self._settings
        if settings.engine == "emulated":
            chosen = preset(settings.preset)
            terms = model_terms(chosen.model)
            emulation = EmulationTerms(terms, self._vocab_size, special_ids_of(settings.model))
            arguments = emulated_arguments(settings, HookConfig("", PlanSettings(), terms, emulation=emulation), chosen)
        else:
            from vllm.platforms import current_platform

            on_cpu = bool(current_platform.is_cpu())
            if on_cpu:
                keep_freed_memory()
            arguments = vllm_arguments(settings, HookConfig("", PlanSettings()), on_cpu)
            del arguments["additional_config"]
        del arguments["scheduler_cls"]
        return arguments

    def _extra_args(self, request_id: str, prompt_ids: tuple[int, ...], max_tokens: int) -> dict[str, Any] | None:
        """What the emulated executor reads of a request; vLLM itself ignores it."""
        if self._settings.engine != "emulated":
            return None
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
        return to_extra_args(terms_of(submission))
