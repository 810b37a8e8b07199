"""vLLM's real scheduler with our hook in it, driven batch by batch on a virtual clock, without an engine process."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from services.core.presets import preset
from services.core.slo import BEST_EFFORT, StageKind, VerdictMode
from services.core.view import PlanSettings
from services.worker.emulated_executor import EmulatedExecutor
from services.worker.engine_arguments import emulated_arguments
from services.worker.engine_settings import EngineSettings
from services.worker.hook_config import EmulationTerms, HookConfig, model_terms
from services.worker.link import DecidedEntry, LinkPath, ReportMessage
from services.worker.request_terms import RequestTerms, StageTerms, to_extra_args
from services.worker.scheduler import SloScheduler

MODEL = Path(__file__).parents[3] / "models" / "tiny"
VOCABULARY = 4096


@dataclass
class Sent:
    """A request and everything that came out of it, with the virtual time of each token."""

    request: Request
    terms: RequestTerms
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish: str = ""

    @property
    def missed(self) -> str:
        """What of its SLO was missed, stage 0 only; empty if nothing."""
        if not self.times_s or self.times_s[0] > self.terms.ttft_deadline_s + 1e-9:
            return "ttft"
        spent_s = self.times_s[-1] - self.times_s[0]
        return "tpot" if spent_s > (len(self.times_s) - 1) * self.terms.stages[0].tpot_s + 1e-9 else ""


@cache
def _engine_config(arguments: tuple[tuple[str, Any], ...]) -> VllmConfig:
    """Configurations are slow to make; equal ones differ only in the address of the link."""
    settings = EngineSettings(engine="emulated", model=str(MODEL), data_dir=Path(), **dict(arguments))
    chosen = preset(settings.preset)
    hook = HookConfig("", settings.plan, model_terms(chosen.model))
    return AsyncEngineArgs(**emulated_arguments(settings, hook, chosen)).create_engine_config()


class DrivenScheduler:
    """One replica on a virtual clock; `depth` batches in flight."""

    def __init__(
        self,
        address: str,
        *,
        depth: int = 1,
        acceptance: float = 0.6,
        hold_first_token: bool = False,
        attainment_floor: float = 0.85,
        patience_s: float = 30.0,
        pausing: bool = True,
        attention: float = 0.0,
        **settings: Any,
    ) -> None:
        self.now_s = 100.0
        self.depth = depth
        self.sent: dict[str, Sent] = {}
        self.batches: list[SchedulerOutput] = []
        chosen = preset(settings.get("preset", "qwen2.5-7b-a100"))
        self.preset = replace(chosen, model=replace(chosen.model, attention=attention))
        config = _engine_config(tuple(sorted(settings.items())))
        terms = model_terms(self.preset.model)
        hook = HookConfig(
            address,
            PlanSettings(hold_first_token=hold_first_token),
            terms,
            emulation=EmulationTerms(terms, VOCABULARY, (0, 1, 2), acceptance),
            attainment_floor=attainment_floor,
            patience_s=patience_s,
            pausing=pausing,
        )
        config.additional_config = hook.additional_config()
        config.scheduler_config.async_scheduling = depth > 1
        config.cache_config.num_gpu_blocks = config.cache_config.num_gpu_blocks_override
        block_size = config.cache_config.block_size
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        self.construction: dict[str, Any] = {
            "vllm_config": config,
            "kv_cache_config": KVCacheConfig(
                config.cache_config.num_gpu_blocks, [], [KVCacheGroupSpec(["layer"], spec)]
            ),
            "structured_output_manager": StructuredOutputManager(config),
            "block_size": block_size,
            "hash_block_size": block_size,
        }
        self.scheduler: SloScheduler = SloScheduler(**self.construction, clock=lambda: self.now_s)
        self.executor = EmulatedExecutor(config)
        hash_function = get_hash_fn_by_name("sha256")
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(block_size, hash_function)
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput, float]] = deque()
        self._device_free_s = 0.0
        self.worker_end: zmq.Socket[bytes] | None = None

    def send(
        self,
        request_id: str,
        prompt: list[int] | int,
        output_tokens: int,
        *,
        ttft_s: float = 1.0,
        tpot_s: float = 0.1,
        tier: str = "loose",
        promised: bool = True,
        pending: VerdictMode | None = None,
        stages: tuple[StageTerms, ...] | None = None,
        stop_token_ids: list[int] | None = None,
        forecast: int | None = None,
        application: str = "app",
        weight: int = 1,
        asked: bool = False,
    ) -> Sent:
        """Put a request into the scheduler's queue now; one that is `pending` has no promise yet.

        `asked`: best effort that once asked for an SLO, as everything that comes from the shared queue has.
        """
        promised = promised and pending is None
        on_tier = promised or pending is not None or asked
        number = len(self.sent)
        ids = [3 + (7 * i + 131 * number) % 4000 for i in range(prompt)] if isinstance(prompt, int) else prompt
        stage = StageTerms(StageKind.ANSWER.value, tier if on_tier else BEST_EFFORT, tpot_s, output_tokens, None)
        terms = RequestTerms(
            request_id,
            1,
            application,
            promised,
            self.now_s + ttft_s,
            self.now_s,
            forecast or output_tokens,
            f"digest-{request_id}",
            0,
            None,
            stages or (stage,),
            pending=pending is not None,
            verdict_mode=pending or VerdictMode.FIRM,
            weight=weight,
        )
        params = SamplingParams(
            max_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=stop_token_ids,
            extra_args=to_extra_args(terms),
        )
        request = Request(request_id, ids, params, None, block_hasher=self._hasher)
        self.sent[request_id] = Sent(request, terms)
        self.scheduler.add_request(request)
        return self.sent[request_id]

    def abort(self, request_id: str) -> None:
        """The client went away."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> SchedulerOutput:
        """Schedule one batch; with the pipeline full, take the output of the oldest first."""
        while len(self._in_flight) >= self.depth:
            self._complete()
        output = self.scheduler.schedule()
        self.batches.append(output)
        if output.total_num_scheduled_tokens:
            shape, result = self.executor.run_batch(output)
            self._device_free_s = max(self.now_s, self._device_free_s) + self.preset.model.seconds(shape)
            self._in_flight.append((output, result, self._device_free_s))
        else:
            self._in_flight.append((output, EMPTY_MODEL_RUNNER_OUTPUT, self.now_s))
        if self.depth == 1:
            self.drain()
        return output

    def drain(self) -> None:
        """Take the output of everything in flight."""
        while self._in_flight:
            self._complete()

    def run(self, until_s: float = float("inf"), most: int = 100_000) -> None:
        """Step until there is no work left, or the clock has passed `until_s`."""
        for _ in range(most):
            if self.now_s >= until_s:
                return
            if not self.scheduler.has_unfinished_requests():
                self.drain()
                self.step()  # as the engine does, to tell its workers what finished
                self.drain()
                return
            self.step()
        raise AssertionError(f"{len(self.scheduler.running)} running, {len(self.scheduler.waiting)} waiting: no end")

    def decided(self, count: int) -> dict[str, DecidedEntry]:
        """The first `count` verdicts on pending requests that the worker was told, by request id."""
        assert self.worker_end is not None
        found: dict[str, DecidedEntry] = {}
        names: dict[int, str] = {}
        while len(found) < count:
            assert self.worker_end.poll(5000), f"only {sorted(found)} were decided"
            report = msgspec.msgpack.decode(self.worker_end.recv(), type=ReportMessage)
            names.update((entry.number, entry.request_id) for entry in report.entries)
            found.update((names[entry.number], entry) for entry in report.decided)
        return found

    def drafts_in_flight(self, request_id: str) -> int:
        """Draft tokens of a request in batches that are not complete."""
        return sum(len(out.scheduled_spec_decode_tokens.get(request_id, ())) for out, _, _ in self._in_flight)

    @property
    def free_blocks(self) -> int:
        """KV blocks the scheduler could allocate now."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def _complete(self) -> None:
        output, result, due_s = self._in_flight.popleft()
        self.now_s = max(self.now_s, due_s)
        self._take(output, result)
        drafts = self.executor.take_draft_token_ids() if self.depth == 1 else None
        if drafts is not None and output.total_num_scheduled_tokens:
            self.scheduler.update_draft_token_ids(drafts)

    def _take(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        for batch in self.scheduler.update_from_output(output, result).values():
            for item in batch.outputs:
                sent = self.sent[item.request_id]
                sent.tokens += item.new_token_ids
                sent.times_s += [self.now_s] * len(item.new_token_ids)
                if item.finish_reason is not None:
                    sent.finish = str(item.finish_reason)


@contextmanager
def driven(**settings: Any) -> Iterator[DrivenScheduler]:
    """A driven scheduler whose reports go into a bound socket, as in a worker."""
    path = LinkPath()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(path.address)
    replica = DrivenScheduler(path.address, **settings)
    replica.worker_end = socket
    try:
        yield replica
    finally:
        replica.scheduler.shutdown()
        socket.close()
        path.close()
