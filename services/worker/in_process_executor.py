"""The model on a CPU, in the engine's own process, on memory that is already there.

On a CPU vLLM runs its workers as processes of their own, to bind each one's OpenMP threads to cores. Engine and worker
then poll one memory queue in turns, and where the services share the cores, the polling itself takes them: one step of
a small model lasts half as long again. One worker whose threads are not bound needs none of it.

oneDNN compiles its kernels anew for every number of tokens it has not seen, and every large batch needs buffers: on a
fresh heap both are paid page by page, which doubles the time of a batch that was quick when it was profiled. So the
heap is grown and touched once, before the first batch.
"""

import torch
from vllm.v1.executor.uniproc_executor import UniProcExecutor

__all__ = ["InProcessExecutor"]

_HEAP_BYTES = 256 << 20
_PIECE_BYTES = 8 << 20  # below the allocator's threshold for mappings of their own, which would be given back


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]
    """vLLM's executor for one worker, under a name that vLLM does not replace on a CPU.

    The number of OpenMP threads, and that the allocator keeps what is freed, come from `engine_environment.py`.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        pieces = [torch.ones(_PIECE_BYTES, dtype=torch.uint8) for _ in range(_HEAP_BYTES // _PIECE_BYTES)]
        del pieces
