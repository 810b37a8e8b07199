"""An executor without a model: it takes the modelled time and returns hash tokens.

Under it run the real AsyncLLM, scheduler and KV cache manager, so the whole stack behaves as on the modelled hardware.
Batches occupy one imaginary device in order; results become due when the device would have them, which makes one batch
in flight and two (asynchronous scheduling) the same code.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput

from services.core.perf_model import BatchShape, attended
from services.worker.hash_tokens import HashTokens, digest_of
from services.worker.hook_config import from_additional_config, model_of
from services.worker.request_terms import from_extra_args

__all__ = ["EmulatedExecutor"]

_SPIN_S = 0.0003
_MEMORY_BYTES = 1 << 40  # of the imaginary device; the number of KV blocks is set explicitly


class _DueResult(Future[ModelRunnerOutput]):
    """A result that nobody sees before its time."""

    def __init__(self, due_s: float, output: ModelRunnerOutput) -> None:
        super().__init__()
        self._due_s = due_s
        self.set_result(output)

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        """Wait until the device is done: sleep, then spin the last moment, because sleeps overshoot."""
        left_s = self._due_s - time.monotonic()
        if left_s > _SPIN_S:
            time.sleep(left_s - _SPIN_S)
        while time.monotonic() < self._due_s:
            pass
        return super().result(timeout)


class EmulatedExecutor(Executor):  # type: ignore[misc]
    """Runs batches on imaginary hardware."""

    def _init_executor(self) -> None:
        emulation = from_additional_config(self.vllm_config.additional_config).emulation
        if emulation is None:
            raise ValueError("the emulated executor needs a performance model to imitate")
        self._model = model_of(emulation.model)
        self._tokens = HashTokens(emulation.vocab_size, emulation.special_ids)
        self._digests: dict[str, str] = {}
        self._known: dict[str, int] = {}
        self._num_drafts = int(self.vllm_config.num_speculative_tokens)
        self._acceptance = emulation.acceptance
        self._drafting: list[str] = []
        self._device_free_s = 0.0
        self._sampled: _DueResult | None = None

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Run one batch; its tokens come with `sample_tokens`, as from a real model runner."""
        now_s = time.monotonic()
        for key in scheduler_output.finished_req_ids:
            self._digests.pop(key, None)
            self._known.pop(key, None)
        if not scheduler_output.total_num_scheduled_tokens:
            result: Future[Any] = Future()
            result.set_result(EMPTY_MODEL_RUNNER_OUTPUT)
            return result if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        shape, output = self.run_batch(scheduler_output)
        self._device_free_s = max(now_s, self._device_free_s) + self._model.seconds(shape)
        self._sampled = _DueResult(self._device_free_s, output)
        nothing: Future[Any] = Future()
        nothing.set_result(None)
        return nothing if non_block else None

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """The tokens of the batch executed last."""
        sampled, self._sampled = self._sampled, None
        if sampled is None:
            raise RuntimeError("sample_tokens without a batch")
        return sampled if non_block else sampled.result()

    def run_batch(self, scheduler_output: SchedulerOutput) -> tuple[BatchShape, ModelRunnerOutput]:
        """The shape of a batch and its tokens, at once."""
        scheduled = scheduler_output.num_scheduled_tokens
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            self._admit(new)
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        drafts = scheduler_output.scheduled_spec_decode_tokens
        sampled: list[list[int]] = []
        pairs = 0.0
        for key, tokens in scheduled.items():
            drafted = len(drafts.get(key, ()))
            if tokens - drafted > 1:
                pairs += attended(computed[key], tokens)
            if computed[key] + tokens - drafted < self._known[key]:
                sampled.append([])
                continue
            known, digest = self._known[key], self._digests[key]
            accepted = next((i for i in range(drafted) if not self._right(digest, known + i)), drafted)
            self._known[key] = known + accepted + 1
            sampled.append([self._tokens.token(digest, known + i) for i in range(accepted + 1)])
        keys = list(scheduled)
        self._drafting = [key for key, ids in zip(keys, sampled, strict=True) if ids]
        shape = BatchShape(
            scheduler_output.total_num_scheduled_tokens,
            sum(computed.values()),
            len(keys),
            max(map(len, drafts.values()), default=0),
            pairs,
        )
        return shape, ModelRunnerOutput(keys, {key: index for index, key in enumerate(keys)}, sampled)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts for what the last batch gave tokens to, as many of them right as the acceptance rate says."""
        if not self._num_drafts:
            return None
        keys = [key for key in self._drafting if key in self._known]
        return DraftTokenIds(keys, [[self._draft(key, i) for i in range(self._num_drafts)] for key in keys])

    def _draft(self, key: str, index: int) -> int:
        digest, position = self._digests[key], self._known[key] + index
        right = self._right(digest, position)
        return self._tokens.token(digest if right else f"{digest}?", position)

    def _right(self, digest: str, position: int) -> bool:
        """Whether the draft for a position is right: a fair coin of its own, the same at every attempt."""
        return self._tokens.coin(digest, position) < self._acceptance

    def _admit(self, new: Any) -> None:
        """A request's first batch, or its first after a preemption."""
        prompt_ids = new.prompt_token_ids or []
        if new.req_id not in self._digests:
            terms = from_extra_args(new.sampling_params.extra_args, new.req_id, new.sampling_params.max_tokens)
            self._digests[new.req_id] = terms.digest or digest_of(prompt_ids)
            self._known[new.req_id] = len(prompt_ids)

    # What the engine asks of any executor

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        """One imaginary attention layer."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
        )
        return [{"layer": spec}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """Any layout would do."""
        return [["LBNHC"]]

    def determine_available_memory(self) -> list[int]:
        """Enough: the number of blocks is set explicitly."""
        return [_MEMORY_BYTES]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        """Remember the layout where vLLM looks for it."""
        self.cache_config.kv_cache_layout = layout_name

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """There is no memory to set up."""

    def compile_or_warm_up_model(self) -> None:
        """There is no model."""

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Answer for the one worker that is not there."""
        answers: dict[str, Any] = {"get_supported_tasks": ("generate",), "shutdown": None}
        if not isinstance(method, str) or method not in answers:
            raise NotImplementedError(f"the emulated executor has no {method}")
        return [answers[method]]

    def check_health(self) -> None:
        """Nothing can break."""

    def shutdown(self) -> None:
        """Nothing to release."""

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Results are futures, so two batches can be in flight."""
        return True
