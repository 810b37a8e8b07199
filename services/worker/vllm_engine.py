"""The engine of a replica: vLLM's AsyncLLM with our scheduler in it, around the real model or the emulated executor."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from services.core.perf_model import PerfModel
from services.core.presets import preset
from services.worker.engine_api import EngineEnd, EngineInfo, EngineOutput, EngineReport, Submission
from services.worker.engine_arguments import emulated_arguments, engine_info, special_ids_of, vllm_arguments
from services.worker.engine_environment import keep_freed_memory, prepare_environment
from services.worker.engine_settings import EngineSettings
from services.worker.extra_arguments import check_known
from services.worker.hook_config import EmulationTerms, HookConfig, model_terms
from services.worker.hook_mirror import HookMirror
from services.worker.link import Directive, ExpectPromises, LinkPath, Promote, Reforecast, SetCap, SetModel, WorkerEnd
from services.worker.profile import load_or_measure
from services.worker.profile_store import ReplicaProfile, processor_name
from services.worker.request_terms import ProbeTerms
from services.worker.sampling import probe_params, sampling_params
from services.worker.version_guard import check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["EngineDiedError", "VllmEngine"]

T = TypeVar("T")

_ENDS = {
    "stop": EngineEnd.STOP,
    "length": EngineEnd.LENGTH,
    "abort": EngineEnd.ABORTED,
    "error": EngineEnd.ERROR,
    "repetition": EngineEnd.STOP,
}


class EngineDiedError(RuntimeError):
    """The engine process is gone or failed; every request it held ends with `EngineEnd.ERROR`."""


class VllmEngine:
    """Implements `Engine` for both `vllm` and `emulated`. One event loop; start once, stop once."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._llm: AsyncLLM | None = None
        self._info: EngineInfo | None = None
        self._profile: ReplicaProfile | None = None
        self._model: PerfModel | None = None
        self._mirror = HookMirror()
        self._reports: asyncio.Queue[EngineReport] = asyncio.Queue()
        self._watchers: list[Callable[[EngineReport], None]] = []
        self._first_report = asyncio.Event()
        self._path: LinkPath | None = None
        self._link: WorkerEnd | None = None
        self._pump: asyncio.Task[None] | None = None
        self._aborted: set[str] = set()
        self._live: set[str] = set()
        self._default_sampling: dict[str, Any] = {}
        self._failed = asyncio.Event()
        self._stopping = False
        self._step_ended_s = 0.0  # of the newest step whose output is here

    # What it is

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be; valid after `start`."""
        return _started(self._info)

    @property
    def perf_model(self) -> PerfModel:
        """The performance model in force; valid after `start`."""
        return _started(self._model)

    @property
    def profile(self) -> ReplicaProfile:
        """Where the performance model came from; R2 is 1.0 where the engine is the model itself."""
        return _started(self._profile)

    @property
    def hook_us(self) -> float:
        """Mean time a step spent in the hook, microseconds, as of the last report."""
        return self._mirror.hook_us

    @property
    def dead(self) -> bool:
        """Whether the engine process is gone; nothing runs on it any more."""
        return self._failed.is_set()

    async def wait_dead(self) -> None:
        """Return once the engine process is gone."""
        await self._failed.wait()

    # Start and stop

    async def start(self) -> None:
        """Load the model, install the scheduler hook, profile (or load the cached profile), and be ready.

        Raises UnsupportedVllmError for another vLLM than the hook was written against, EngineDiedError if the engine
        process fails while starting.
        """
        check_vllm()
        prepare_environment(self._settings)
        self._path = LinkPath()
        self._link = WorkerEnd(self._path.address)
        self._pump = asyncio.create_task(self._receive(self._link), name="hook-reports")
        if self._settings.engine == "emulated":
            await self._start_emulated(self._path.address)
        else:
            await self._start_vllm(self._path.address)

    async def stop(self) -> None:
        """Stop the engine process."""
        self._stopping = True
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:  # else it would log the engine's planned end as a failure
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown)
            del llm
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
        if self._link is not None:
            self._link.close()
        if self._path is not None:
            self._path.close()

    async def _start_emulated(self, address: str) -> None:
        chosen = preset(self._settings.preset)
        model = model_terms(chosen.model)
        vocabulary = await asyncio.to_thread(_vocabulary_size, self._settings.model)
        hook = HookConfig(
            address,
            self._settings.plan,
            model,
            self._settings.lapse_s,
            emulation=EmulationTerms(
                model, vocabulary, special_ids_of(self._settings.model), self._settings.emulated_acceptance
            ),
            policy=self._settings.policy,
            early_prompt_tokens=self._settings.early_prompt_tokens,
            attainment_floor=self._settings.attainment_floor,
            patience_s=self._settings.patience_s,
            pausing=self._settings.pausing,
        )
        await self._launch(emulated_arguments(self._settings, hook, chosen), bool(self._settings.async_scheduling))
        self._profile = ReplicaProfile(chosen.model, 1.0)
        self._model = chosen.model

    async def _start_vllm(self, address: str) -> None:
        from vllm.platforms import current_platform

        hook = HookConfig(
            address,
            self._settings.plan,
            lapse_s=self._settings.lapse_s,
            policy=self._settings.policy,
            early_prompt_tokens=self._settings.early_prompt_tokens,
            attainment_floor=self._settings.attainment_floor,
            patience_s=self._settings.patience_s,
            pausing=self._settings.pausing,
        )
        on_cpu = bool(current_platform.is_cpu())
        if on_cpu:
            keep_freed_memory()
        config = await self._launch(vllm_arguments(self._settings, hook, on_cpu), False)
        hardware = processor_name() if on_cpu else str(current_platform.get_device_name())
        self._profile = await load_or_measure(self, self._settings, config, hardware)
        self._model = self._profile.model
        self.direct(SetModel(model_terms(self._model)))
        self._reports = asyncio.Queue()

    async def _launch(self, arguments: dict[str, Any], force_async: bool) -> "VllmConfig":
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        check_known(arguments, (field.name for field in fields(AsyncEngineArgs)))
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)  # larger batches
        if force_async:  # vLLM turns it off on CPU hosts, but the emulated device is no CPU
            config.scheduler_config.async_scheduling = True
        try:
            self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=arguments["disable_log_stats"])
        except Exception as error:
            raise EngineDiedError(f"the engine did not start: {error}") from error
        _started(self._llm.output_handler).add_done_callback(self._on_output_handler_done)
        self._watch_step_ends(self._llm.output_processor)
        await self._first_report.wait()
        self._default_sampling = dict(config.model_config.get_diff_sampling_param())
        self._info = engine_info(config, self._mirror.total_blocks, self._mirror.block_size)
        return config

    def _watch_step_ends(self, output_processor: Any) -> None:
        """Tokens are timed by the end of their step in the engine process, not by when this loop gets to them.

        Both processes read one monotonic clock.
        """
        take = output_processor.process_outputs

        def timed(outputs: Any, ended_s: float | None = None, *rest: Any, **options: Any) -> Any:
            if ended_s is not None:
                self._step_ended_s = ended_s
            return take(outputs, ended_s, *rest, **options)

        output_processor.process_outputs = timed

    def _on_output_handler_done(self, _: "asyncio.Task[None]") -> None:
        if not self._stopping:
            self._failed.set()

    # Requests

    async def generate(self, submission: Submission) -> AsyncIterator[EngineOutput]:
        """Run one request; one output per engine step that gave it tokens. Closing the iterator aborts it."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        llm, request_id = _started(self._llm), submission.request_id
        params = sampling_params(submission, self._default_sampling, self.info.eos_token_ids)
        collector = None
        finished = False
        self._live.add(request_id)
        try:
            collector = await llm.add_request(
                request_id,
                tokens_input(list(submission.token_ids)),
                params,
                trace_headers=self._trace_headers(submission),
            )
            while not finished:
                if request_id in self._aborted:
                    self._aborted.discard(request_id)
                    await llm.abort(request_id)
                output = collector.get_nowait() or await collector.get()
                completion = output.outputs[0]
                finished = bool(output.finished)
                end = _ENDS.get(completion.finish_reason or "error", EngineEnd.ERROR) if finished else None
                yield EngineOutput(request_id, tuple(completion.token_ids), self._step_ended_s, end)
        except EngineDeadError as error:
            finished = True
            self._failed.set()
            yield EngineOutput(request_id, (), time.monotonic(), EngineEnd.ERROR, f"the engine died: {error}")
        except (VLLMClientError, ValueError) as error:  # refused: a prompt beyond the context, a bad parameter
            finished = True
            yield EngineOutput(request_id, (), time.monotonic(), EngineEnd.ERROR, str(error))
        finally:
            self._live.discard(request_id)
            self._aborted.discard(request_id)
            if collector is not None:
                if not finished:
                    await llm.abort(collector.request_id, internal=True)
                collector.close()

    async def run_probe(self, request_id: str, prompt_ids: list[int], steps: int, probe: ProbeTerms) -> None:
        """Run a request that only measures, to its end. One with drafts repeats the last token of its prompt."""
        from vllm.inputs.engine import tokens_input

        params = probe_params(request_id, steps, probe, prompt_ids[-1] if probe.draft_steps else None)
        async for _ in _started(self._llm).generate(tokens_input(prompt_ids), params, request_id):
            pass

    async def abort(self, request_id: str) -> None:
        """Free the request's KV blocks within one engine step; its iterator ends with `EngineEnd.ABORTED`."""
        if request_id not in self._live:
            return
        llm = _started(self._llm)
        if llm.output_processor.external_req_ids.get(request_id):
            await llm.abort(request_id)
        else:  # on its way to the engine: its iterator sees the mark once it is there
            self._aborted.add(request_id)

    def _trace_headers(self, submission: Submission) -> dict[str, str] | None:
        """The request's trace, for vLLM's own span; vLLM warns where it is given one and has nowhere to send it."""
        if self._settings.otlp_endpoint is None or not submission.traceparent:
            return None
        return {"traceparent": submission.traceparent, "tracestate": submission.tracestate}

    # Reports and directives

    def promote(self, request_id: str, tier: str) -> None:
        """Make a best-effort request a promised one, from the next step on."""
        self.direct(Promote(request_id, tier))

    def reforecast(self, request_id: str, output_tokens: int) -> None:
        """Expect a request's attempt to produce `output_tokens` in all, from the next step on."""
        self.direct(Reforecast(request_id, output_tokens))

    def set_duration_cap(self, seconds: float | None) -> None:
        """Cap the duration of batches from the next step on; `None` lifts the cap."""
        self.direct(SetCap(seconds))

    def expect_promises(self) -> None:
        """Keep batches short from the next step on, for as long as after a promise."""
        self.direct(ExpectPromises())

    def direct(self, directive: Directive) -> None:
        """Send a directive to the hook."""
        _started(self._link).send(directive)

    def request_snapshot(self) -> None:
        """Queue a full report of the engine as of the last one; the mirror holds every request the hook reported."""
        snapshot = self._mirror.snapshot()
        if snapshot is not None:
            self._reports.put_nowait(snapshot)

    async def reports(self) -> AsyncIterator[EngineReport]:
        """Reports of the hook, in order. One consumer."""
        while True:
            yield await self._reports.get()

    @contextlib.contextmanager
    def watching(self, watcher: Callable[[EngineReport], None]) -> Any:
        """Call `watcher` with every report while the context is open."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    async def _receive(self, link: WorkerEnd) -> None:
        while True:
            report = self._mirror.apply(await link.receive())
            if report.perf_model is not None:
                self._model = report.perf_model
            for watcher in self._watchers:
                watcher(report)
            self._reports.put_nowait(report)
            self._first_report.set()


def _started(value: T | None) -> T:
    if value is None:
        raise RuntimeError("the engine has not been started")
    return value


def _vocabulary_size(model: str) -> int:
    from vllm.transformers_utils.config import get_config

    return int(get_config(model, trust_remote_code=False).get_text_config().vocab_size)
