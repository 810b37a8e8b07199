"""vLLM's configuration for a scheduler that runs without an engine, and the schedulers built on it.

A configuration takes seconds to make, so that equal ones are made once per process. vLLM is imported when the first one
is, after the environment it reads has been set.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from services.core.admission import Policy
from services.core.presets import Preset
from services.core.view import PlanSettings
from services.worker.engine_arguments import emulated_arguments
from services.worker.engine_environment import prepare_environment
from services.worker.engine_settings import EngineSettings
from services.worker.hook_config import HookConfig, model_terms

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

__all__ = ["MODEL", "EngineShape", "Engines"]

MODEL = Path(__file__).parents[1] / "models" / "tiny"
"""The bundled model: only its configuration is read."""

_ADDRESS = "inproc://simulator"  # nobody listens: the simulator takes the place of the link


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What a simulated replica looks like to vLLM.

    token_budget: tokens per step. priority: vLLM's own priority policy. depth: batches in flight.
    """

    preset: Preset
    token_budget: int = 8192
    priority: bool = False
    prefix_caching: bool = False
    depth: int = 1
    kv_blocks: int | None = None

    @property
    def blocks(self) -> int:
        """KV blocks of the replica."""
        return self.kv_blocks or self.preset.kv_blocks


class Engines:
    """Makes schedulers; keeps the configurations."""

    def __init__(self) -> None:
        self._configs: dict[EngineShape, Any] = {}

    def plain(self, shape: EngineShape) -> "Scheduler":
        """vLLM's own scheduler."""
        construction = self._construction(shape, HookConfig(_ADDRESS, PlanSettings()))
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        chosen = AsyncScheduler if shape.depth > 1 else Scheduler
        return chosen(**construction)

    def hooked(
        self,
        shape: EngineShape,
        plan: PlanSettings,
        policy: Policy,
        floor: float,
        clock: Callable[[], float],
        *,
        pausing: bool = True,
    ) -> Any:
        """Our scheduler, on `clock`."""
        hook = HookConfig(_ADDRESS, plan, policy=policy, attainment_floor=floor, pausing=pausing)
        construction = self._construction(shape, hook)
        from bench.simulator_hook import AsyncSimulatedHook, SyncSimulatedHook

        chosen = AsyncSimulatedHook if shape.depth > 1 else SyncSimulatedHook
        return chosen(**construction, clock=clock)

    def production(self, shape: EngineShape, address: str, clock: Callable[[], float]) -> Any:
        """Our scheduler as an engine runs it, reporting to the link at `address`."""
        construction = self._construction(shape, HookConfig(address, PlanSettings()))
        from services.worker.scheduler import SloScheduler

        return SloScheduler(**construction, clock=clock)

    def block_hasher(self, shape: EngineShape) -> Callable[[Any], list[Any]] | None:
        """What a request is hashed with for the prefix cache; None where that is off."""
        if not shape.prefix_caching:
            return None
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        hasher: Callable[[Any], list[Any]] = get_request_block_hasher(shape.preset.block_size, hash_function)
        return hasher

    def _construction(self, shape: EngineShape, hook: HookConfig) -> dict[str, Any]:
        config = self._config(shape)
        modelled = msgspec.structs.replace(hook, model=model_terms(shape.preset.model))
        config.additional_config = modelled.additional_config()
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        block_size = shape.preset.block_size
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        return {
            "vllm_config": config,
            "kv_cache_config": KVCacheConfig(shape.blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            "structured_output_manager": StructuredOutputManager(config),
            "block_size": block_size,
            "hash_block_size": block_size,
        }

    def _config(self, shape: EngineShape) -> Any:
        if shape not in self._configs:
            self._configs[shape] = _make_config(shape)
        return copy.copy(self._configs[shape])


def _make_config(shape: EngineShape) -> Any:
    preset = shape.preset
    settings = EngineSettings(
        engine="emulated",
        model=str(MODEL),
        data_dir=Path(),
        kv_blocks=shape.blocks,
        prefix_caching=shape.prefix_caching,
        max_batch_tokens=max(shape.token_budget, preset.max_num_seqs),
    )
    prepare_environment(settings)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = emulated_arguments(settings, HookConfig(_ADDRESS, PlanSettings(), model_terms(preset.model)), preset)
    config = AsyncEngineArgs(**arguments).create_engine_config()
    scheduling = config.scheduler_config
    scheduling.async_scheduling = shape.depth > 1
    scheduling.policy = "priority" if shape.priority else "fcfs"
    if shape.token_budget < preset.max_num_seqs:
        scheduling.max_num_scheduled_tokens = shape.token_budget
    config.cache_config.num_gpu_blocks = shape.blocks
    return config
