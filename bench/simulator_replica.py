"""One simulated replica: vLLM's real scheduler around an imaginary device that takes the modelled time."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.simulator_call import LiveCall
from bench.simulator_engine import EngineShape
from services.core.perf_model import BatchShape
from services.core.slo import BEST_EFFORT, Tier, VerdictMode, tier_for
from services.worker.request_terms import RequestTerms, StageTerms, to_extra_args

__all__ = ["Replica", "StuckError", "Tokens"]

_TRIES = 3  # our scheduler lets vLLM try by itself after a batch that could not be executed
_VOCABULARY = 4000


class StuckError(RuntimeError):
    """The scheduler has work and schedules none of it."""


class Tokens(NamedTuple):
    """New tokens of a call, and whether they were its last."""

    call: LiveCall
    tokens: int
    finished: bool


class _InFlight(NamedTuple):
    output: Any
    result: Any
    due_s: float


class Replica:
    """Calls go in with `add`; `step` starts a batch and says when it will be done; `complete` takes its tokens."""

    def __init__(
        self,
        scheduler: Any,
        shape: EngineShape,
        tiers: tuple[Tier, ...],
        block_hasher: Callable[[Any], list[Any]] | None = None,
    ) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
        from vllm.v1.request import Request

        self.scheduler = scheduler
        self.shape = shape
        self.steps = 0
        self.calls: dict[str, LiveCall] = {}
        self._prepared: dict[str, Any] = {}
        self._tiers = tiers
        self._hasher = block_hasher
        self._model = shape.preset.model
        self._sees_context = any(row[1] > 0 for row in self._model.rows)
        self._request_type, self._params_type = Request, SamplingParams
        self._output_type, self._empty = ModelRunnerOutput, EMPTY_MODEL_RUNNER_OUTPUT
        self._in_flight: deque[_InFlight] = deque()
        self._device_free_s = 0.0

    @property
    def has_room(self) -> bool:
        """Whether another batch may be started."""
        return len(self._in_flight) < self.shape.depth

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.scheduler.has_unfinished_requests())

    def add(
        self, live: LiveCall, *, forecast_tokens: int, promised: bool, now_s: float, pending: VerdictMode | None = None
    ) -> None:
        """Put a call into the scheduler's queue; `pending` is how the hook decides it, where it does."""
        call = live.call
        stages = tuple(
            StageTerms(stage.kind.value, self.tier_name(stage.tpot_s), stage.tpot_s, stage.tokens, None)
            for stage in call.stages
        )
        terms = RequestTerms(
            live.key, 1, live.job.application, promised, live.deadline_s, live.arrival_s, forecast_tokens, "", 0, None,
            stages, pending=pending is not None, verdict_mode=pending or VerdictMode.FIRM,
        )  # fmt: skip
        request = self._prepared.pop(live.key, None) or self._request(live)
        request.sampling_params.extra_args = to_extra_args(terms)
        self.calls[live.key] = live
        if promised:
            live.promised_s = now_s
        self.scheduler.add_request(request)

    def drop(self, key: str) -> None:
        """Abort a call."""
        from vllm.v1.request import RequestStatus

        if self.calls.pop(key, None) is not None:
            self.scheduler.finish_requests(key, RequestStatus.FINISHED_ABORTED)

    def cached_tokens(self, live: LiveCall) -> int:
        """Prompt tokens of a call not yet added that the prefix cache holds now."""
        if self._hasher is None or live.call.cached_tokens == 0:
            return 0
        request = self._prepared.get(live.key)
        if request is None:
            request = self._prepared[live.key] = self._request(live)
        return int(self.scheduler.kv_cache_manager.get_computed_blocks(request)[1])

    def _request(self, live: LiveCall) -> Any:
        call = live.call
        params = self._params_type(max_tokens=call.output_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        tightest_s = min(stage.tpot_s for stage in call.stages)
        prompt = [self._token(live, position) for position in range(call.prompt_tokens)]
        return self._request_type(
            live.key, prompt, params, None, arrival_time=live.arrival_s, priority=round(tightest_s * 1000),
            block_hasher=self._hasher,
        )  # fmt: skip

    def tier_name(self, tpot_s: float) -> str:
        """Name of the tier that a stage belongs to."""
        index = tier_for(tpot_s, self._tiers)
        return BEST_EFFORT if index < 0 else self._tiers[index].name

    def step(self, now_s: float) -> float | None:
        """Start the next batch; when it will be done, None if the scheduler has nothing to run.

        Raises StuckError where nothing is in flight, there is work, and none of it is scheduled.
        """
        for _ in range(_TRIES):
            output = self.scheduler.schedule()
            self.steps += 1
            if output.total_num_scheduled_tokens:
                return self._run(output, now_s)
            if self._in_flight:  # the engine goes on with the batch it has
                self._in_flight.append(_InFlight(output, self._empty, self._in_flight[-1].due_s))
                return self._in_flight[-1].due_s
            self.scheduler.update_from_output(output, self._empty)
        if self.has_work:
            raise StuckError(f"{len(self.scheduler.running)} running, {len(self.scheduler.waiting)} waiting, no batch")
        return None

    def complete(self, now_s: float) -> list[Tokens]:
        """Take the output of the oldest batch in flight."""
        output, result, _ = self._in_flight.popleft()
        tokens = []
        for batch in self.scheduler.update_from_output(output, result).values():
            for item in batch.outputs:
                finished = item.finish_reason is not None
                call = self.calls.pop(item.request_id) if finished else self.calls[item.request_id]
                tokens.append(Tokens(call, len(item.new_token_ids), finished))
        return tokens

    def _run(self, output: Any, now_s: float) -> float:
        scheduled = output.num_scheduled_tokens
        requests = self.scheduler.requests
        sampled: list[list[int]] = []
        context = 0
        for key in scheduled:
            request = requests[key]
            computed = request.num_computed_tokens
            context += computed
            sampled.append([self._token(self.calls[key], computed)] if computed >= request.num_tokens else [])
        total = output.total_num_scheduled_tokens
        keys = list(scheduled)
        result = self._output_type(keys, {key: index for index, key in enumerate(keys)}, sampled)
        shape = BatchShape(total, context - total if self._sees_context else 0, len(keys))
        self._device_free_s = max(now_s, self._device_free_s) + self._model.seconds(shape)
        self._in_flight.append(_InFlight(output, result, self._device_free_s))
        return self._device_free_s

    def _token(self, live: LiveCall, position: int) -> int:
        """The token at a position: a session's history repeats in its later prompts, so it depends on the job alone."""
        return 3 + (live.job.number * 7919 + position * 104_729) % _VOCABULARY if self._hasher else 7
