"""vLLM's own engine arguments, passed through: everything that this project has no opinion about.

Parallelism, quantisation, compilation, attention backends and the rest are vLLM's, under vLLM's names. Arguments that a
setting of the worker stands for, and those that would take the engine from under the hook, are refused by name.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["RESERVED_ARGUMENTS", "check_extra_arguments", "check_known"]

_NOT_WITH_HOOK = "the scheduler hook does not support it"

RESERVED_ARGUMENTS: Final[Mapping[str, str]] = {
    "model": "use SLOS_MODEL",
    "dtype": "use SLOS_DTYPE",
    "load_format": "use SLOS_WEIGHTS",
    "max_model_len": "use SLOS_MAX_MODEL_LEN",
    "max_num_seqs": "use SLOS_MAX_NUM_SEQS",
    "max_num_batched_tokens": "use SLOS_MAX_BATCH_TOKENS",
    "block_size": "use SLOS_BLOCK_SIZE",
    "num_gpu_blocks_override": "use SLOS_KV_BLOCKS",
    "gpu_memory_utilization": "use SLOS_GPU_MEMORY_SHARE",
    "async_scheduling": "use SLOS_ASYNC_SCHEDULING",
    "speculative_config": "use SLOS_SPECULATION",
    "spec_method": "use SLOS_SPECULATION",
    "spec_model": "use SLOS_SPECULATION",
    "spec_tokens": "use SLOS_SPECULATION_TOKENS",
    "kv_cache_memory_bytes": "use SLOS_KV_CACHE_GIB or SLOS_GPU_MEMORY_SHARE",
    "max_num_scheduled_tokens": "the scheduler hook sets it step by step",
    "otlp_traces_endpoint": "use OTEL_EXPORTER_OTLP_ENDPOINT",
    "scheduler_cls": "the worker sets it",
    "scheduling_policy": "the worker sets it",
    "additional_config": "the worker sets it",
    "skip_tokenizer_init": "the worker sets it",
    "disable_log_stats": "the worker sets it",
    "enable_chunked_prefill": "the worker needs it on",
    "pipeline_parallel_size": _NOT_WITH_HOOK,
    "data_parallel_size": "start a worker for each replica",
    "kv_transfer_config": _NOT_WITH_HOOK,
    "kv_offloading_size": _NOT_WITH_HOOK,
    "runner": "the worker serves generation",
}
"""Why each of these may not be given, by vLLM's name."""


def check_extra_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the argument and what to use instead, if one of them may not be given."""
    for name in arguments:
        if (why := RESERVED_ARGUMENTS.get(name)) is not None:
            raise ValueError(f"{name!r} may not be given: {why}")


def check_known(arguments: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for arguments that this vLLM does not have."""
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"SLOS_ENGINE_ARGS: vLLM has no engine argument {', '.join(map(repr, unknown))}")
