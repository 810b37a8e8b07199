"""Environment variables of an engine: those vLLM reads when it is imported, and those of a CPU engine's allocator."""

import os
from pathlib import Path

from services.worker.engine_settings import EngineSettings

__all__ = ["keep_freed_memory", "prepare_environment"]


def prepare_environment(settings: EngineSettings) -> None:
    """Set what vLLM reads from the environment; what the operator has set stays.

    Call before vLLM is imported. A CPU engine's threads are not bound to cores: the services run on the same ones.
    """
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(settings.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "OTEL_SERVICE_NAME": "slos-serve-engine",  # of the engine process's start-up spans; services name themselves
    }
    if Path(settings.model).is_dir():
        defaults["HF_HUB_OFFLINE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if settings.cpu_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.cpu_threads)
    # vLLM looks for n-grams in numba's parallel code, which at its first call gives the whole process numba's number of
    # threads: without this the model runs on all cores from the first draft on, against the services.
    os.environ["NUMBA_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]


def keep_freed_memory() -> None:
    """Have the allocator (glibc's, or tcmalloc where it is preloaded) keep what a large batch freed; for CPU engines.

    Given back to the system, the next large batch faults it in again page by page, and takes up to twice as long as
    when it was profiled. A model on a GPU has its batches there. The engine process inherits it: call before it starts.
    """
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 40))
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))  # the largest that glibc takes
    os.environ.setdefault("TCMALLOC_RELEASE_RATE", "0")
