"""vLLM's engine arguments for the two engines, and what they turned out to be."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.core.presets import Preset
from services.worker.engine_api import EngineInfo
from services.worker.engine_settings import EngineSettings
from services.worker.hook_config import HookConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["emulated_arguments", "engine_info", "special_ids_of", "vllm_arguments"]

_SCHEDULER = "services.worker.scheduler.SloScheduler"
_CPU_EXECUTOR = "services.worker.in_process_executor.InProcessExecutor"
_EXECUTOR = "services.worker.emulated_executor.EmulatedExecutor"
_CPU_BLOCK_SIZE = 32
_CPU_BATCH_TOKENS = 512
_CPU_MAX_NUM_SEQS = 64
_CPU_KV_CACHE_GIB = 1.0
_GIB = 1 << 30
_NGRAM_MIN, _NGRAM_MAX = 2, 5  # tokens that must match for a draft


def vllm_arguments(settings: EngineSettings, hook: HookConfig, on_cpu: bool) -> dict[str, Any]:
    """Arguments that run the model itself; the settings' own extra ones have the last word."""
    arguments = _common(settings, hook)
    arguments.update(dtype=settings.dtype, load_format=settings.weights, async_scheduling=settings.async_scheduling)
    if settings.kv_blocks is not None:
        arguments["num_gpu_blocks_override"] = settings.kv_blocks
    if on_cpu:
        arguments.update(
            block_size=settings.block_size or _CPU_BLOCK_SIZE,
            max_num_batched_tokens=settings.max_batch_tokens or _CPU_BATCH_TOKENS,
            max_num_seqs=settings.max_num_seqs or _CPU_MAX_NUM_SEQS,
            kv_cache_memory_bytes=int((settings.kv_cache_gib or _CPU_KV_CACHE_GIB) * _GIB),
            enforce_eager=True,
            distributed_executor_backend=_CPU_EXECUTOR,
        )
    elif settings.gpu_memory_share is not None:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_share
    return arguments | dict(settings.extra)


def emulated_arguments(settings: EngineSettings, hook: HookConfig, preset: Preset) -> dict[str, Any]:
    """Arguments that run the emulated executor with a preset's memory."""
    max_model_len = settings.max_model_len or preset.max_model_len
    arguments = _common(settings, hook)
    arguments.update(
        distributed_executor_backend=_EXECUTOR,
        dtype="bfloat16",
        max_model_len=max_model_len,
        hf_overrides={"max_position_embeddings": max_model_len},
        block_size=settings.block_size or preset.block_size,
        num_gpu_blocks_override=settings.kv_blocks or preset.kv_blocks,
        max_num_seqs=settings.max_num_seqs or preset.max_num_seqs,
        max_num_batched_tokens=settings.max_batch_tokens or settings.plan.max_batch_tokens,
        enforce_eager=True,
    )
    return arguments


def engine_info(config: "VllmConfig", total_blocks: int, block_size: int) -> EngineInfo:
    """What the configuration turned out to be, once the engine has started."""
    return EngineInfo(
        model=str(config.model_config.model),
        max_model_len=int(config.model_config.max_model_len),
        total_blocks=total_blocks,
        block_size=block_size,
        max_num_seqs=int(config.scheduler_config.max_num_seqs),
        async_scheduling=bool(config.scheduler_config.async_scheduling),
        max_batch_tokens=int(config.scheduler_config.max_num_batched_tokens),
        eos_token_ids=_eos_ids(config),
        max_verify_tokens=1 + int(config.speculative_config.num_speculative_tokens if config.speculative_config else 0),
    )


def special_ids_of(model: str) -> tuple[int, ...]:
    """Special tokens of a model's tokenizer.json, in its directory or on the hub; none where there is no such file."""
    path = Path(model) / "tokenizer.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model, "tokenizer.json"))
    if not path.is_file():
        return ()
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    return tuple(sorted(int(token["id"]) for token in added if token.get("special")))


def _common(settings: EngineSettings, hook: HookConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": settings.model,
        "skip_tokenizer_init": True,
        "scheduler_cls": _SCHEDULER,
        "scheduling_policy": "fcfs",
        "additional_config": hook.additional_config(),
        "enable_prefix_caching": settings.prefix_caching,
        "disable_log_stats": settings.otlp_endpoint is None,
        "otlp_traces_endpoint": settings.otlp_endpoint,
        "seed": 0,
    }
    if settings.speculation_tokens:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": settings.speculation_tokens,
            "prompt_lookup_max": _NGRAM_MAX,
            "prompt_lookup_min": _NGRAM_MIN,
        }
    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_batch_tokens,
        "block_size": settings.block_size,
    }
    arguments.update({name: value for name, value in optional.items() if value is not None})
    return arguments


def _eos_ids(config: "VllmConfig") -> tuple[int, ...]:
    """End-of-sequence ids of the model's generation configuration, else of its configuration."""
    generation = config.model_config.try_get_generation_config() or {}
    found = generation.get("eos_token_id", getattr(config.model_config.hf_text_config, "eos_token_id", None))
    if found is None:
        return ()
    return (int(found),) if isinstance(found, int) else tuple(int(token) for token in found)
