"""What an engine is started with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.core.admission import Policy
from services.core.best_effort import BEST_EFFORT_PATIENCE_S
from services.core.verdict import EARLY_PROMPT_TOKENS
from services.core.view import PlanSettings
from services.worker.hook_config import ATTAINMENT_FLOOR

__all__ = ["EngineSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one replica's engine. `None` leaves a choice to the engine, the model or the preset.

    engine: `vllm` runs the model; `emulated` runs the same engine around an executor that takes the modelled time.
    model: model directory or hub id; the emulated engine only reads its configuration and tokenizer.
    preset: hardware and model that the emulated engine imitates.
    kv_blocks, block_size: KV cache in blocks of `block_size` tokens.
    max_batch_tokens: the engine's own limit on tokens per batch.
    weights: `dummy` fills the model with random values: as fast as the real ones, for measurements without them.
    dtype: `auto`, `float32`, `bfloat16` or `float16`; where outputs must be reproducible, float32 and one thread.
    cpu_threads: threads of a CPU engine.
    kv_cache_gib: memory for the KV cache of a CPU engine.
    gpu_memory_share: share of a GPU's memory for weights and KV cache.
    async_scheduling: two batches in flight; None is vLLM's own choice (off on CPU), the emulated engine's is off.
    extra: engine arguments of vLLM's that have no setting here, by vLLM's names (`vllm` only).
    data_dir: where fitted profiles are kept.
    profile_s: about how long a replica without a cached profile measures itself.
    otlp_endpoint: where vLLM's own span of each request goes; None where nobody collects it. Costs vLLM's statistics.
    lapse_s: this long after the last promise, batches are no longer shortened for promises to come.
    policy: how to choose among pending requests that do not all fit.
    early_prompt_tokens: pending prompts up to this long are promised as soon as a plan holds them.
    attainment_floor: pending requests of an application with less attainment than this count ten times as heavy.
    speculation_tokens: draft tokens that the engine proposes per step, from n-grams of the request; 0: it does not.
    emulated_acceptance: share of the emulated engine's draft tokens that are right.
    patience_s: how long best effort waits for what is left over before it is planned among the promises.
    pausing: promised decoders that are far ahead of their deadlines may be preempted for a while where memory is short.
    """

    engine: Literal["vllm", "emulated"]
    model: str
    data_dir: Path
    preset: str = "qwen2.5-7b-a100"
    kv_blocks: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    max_batch_tokens: int | None = None
    weights: Literal["auto", "dummy"] = "auto"
    dtype: str = "auto"
    cpu_threads: int | None = None
    kv_cache_gib: float | None = None
    gpu_memory_share: float | None = None
    async_scheduling: bool | None = None
    prefix_caching: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    plan: PlanSettings = field(default_factory=PlanSettings)
    profile_s: float = 8.0
    otlp_endpoint: str | None = None
    lapse_s: float = 5.0
    policy: Policy = Policy.MH
    early_prompt_tokens: int = EARLY_PROMPT_TOKENS
    attainment_floor: float = ATTAINMENT_FLOOR
    speculation_tokens: int = 0
    emulated_acceptance: float = 0.6
    patience_s: float = BEST_EFFORT_PATIENCE_S
    pausing: bool = True

    @property
    def threads(self) -> int:
        """Threads of a CPU engine: by default all cores but one, which the services and the engine's own loop need."""
        return self.cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1)
