"""Our scheduler and vLLM's own side by side: the same requests, the same sequence of steps, each on its own clock.

Both run without an engine; what is timed is what an engine's step waits for: `schedule()` and `update_from_output()`.
The reports of the hook go through a real socket and are read at its other end between the timed sections.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import zmq

from bench.simulator_engine import Engines, EngineShape
from services.core.perf_model import BatchShape
from services.core.slo import BEST_EFFORT, StageKind, VerdictMode
from services.worker.link import LinkPath
from services.worker.request_terms import RequestTerms, StageTerms, to_extra_args

__all__ = ["Arrival", "Side", "Spent", "sides"]

_TOKEN = 7


class Arrival(NamedTuple):
    """A request to send. `pending` and `promised` as in `RequestTerms`; neither is best effort."""

    prompt_tokens: int
    output_tokens: int
    tier: str
    tpot_s: float
    ttft_s: float
    promised: bool
    pending: bool


class Spent(NamedTuple):
    """Seconds of a step by the clock, and of this thread's CPU."""

    wall_s: float
    cpu_s: float


class _InFlight(NamedTuple):
    output: Any
    result: Any
    due_s: float


class Side:
    """One scheduler on a virtual clock that the performance model advances."""

    def __init__(self, scheduler: Any, shape: EngineShape, clock: list[float], reports: Any | None) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
        from vllm.v1.request import Request

        self.scheduler = scheduler
        self._shape = shape
        self._clock = clock
        self._reports = reports
        self._types = (Request, SamplingParams, ModelRunnerOutput)
        self._empty = EMPTY_MODEL_RUNNER_OUTPUT
        self._in_flight: deque[_InFlight] = deque()
        self._device_free_s = 0.0
        self._sent = 0
        self._spent = Spent(0.0, 0.0)

    @property
    def unfinished(self) -> int:
        """Requests in the scheduler, waiting ones included."""
        return len(self.scheduler.requests)

    def send(self, arrival: Arrival) -> None:
        """Put a request into the queue."""
        request_type, params_type, _ = self._types
        key, now_s = f"r{self._sent}", self._clock[0]
        self._sent += 1
        on_tier = arrival.promised or arrival.pending
        stage = StageTerms(
            StageKind.ANSWER.value,
            arrival.tier if on_tier else BEST_EFFORT,
            arrival.tpot_s,
            arrival.output_tokens,
            None,
        )
        terms = RequestTerms(
            key, 1, "app", arrival.promised, now_s + arrival.ttft_s, now_s, arrival.output_tokens, "", 0, None,
            (stage,),
            pending=arrival.pending, verdict_mode=VerdictMode.EARLY,
        )  # fmt: skip
        params = params_type(
            max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True, detokenize=False,
            extra_args=to_extra_args(terms),
        )  # fmt: skip
        self.scheduler.add_request(request_type(key, [_TOKEN] * arrival.prompt_tokens, params, None))

    def step(self) -> Spent:
        """One step of the engine; what it spent in the scheduler."""
        self._spent = Spent(0.0, 0.0)
        if len(self._in_flight) >= self._shape.depth:
            self._complete()
        self._run(self._timed(self.scheduler.schedule))
        if self._shape.depth == 1:
            self._complete()
        while self._reports is not None and self._reports.poll(0):
            self._reports.recv()
        return self._spent

    def _complete(self) -> None:
        output, result, due_s = self._in_flight.popleft()
        self._clock[0] = max(self._clock[0], due_s)
        self._timed(partial(self.scheduler.update_from_output, output, result))

    def _timed(self, call: Callable[[], Any]) -> Any:
        begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
        result = call()
        cpu_s, wall_s = time.thread_time() - begin_cpu_s, time.perf_counter() - begin_s
        self._spent = Spent(self._spent.wall_s + wall_s, self._spent.cpu_s + cpu_s)
        return result

    def _run(self, output: Any) -> None:
        scheduled = output.num_scheduled_tokens
        requests = self.scheduler.requests
        keys = list(scheduled)
        if not keys:
            self._in_flight.append(_InFlight(output, self._empty, self._clock[0]))
            return
        computed = [requests[key].num_computed_tokens for key in keys]
        sampled = [
            [_TOKEN] if done >= requests[key].num_tokens else [] for key, done in zip(keys, computed, strict=True)
        ]
        total = output.total_num_scheduled_tokens
        result = self._types[2](keys, {key: index for index, key in enumerate(keys)}, sampled)
        seconds = self._shape.preset.model.seconds(BatchShape(total, sum(computed) - total, len(keys)))
        self._device_free_s = max(self._clock[0], self._device_free_s) + seconds
        self._in_flight.append(_InFlight(output, result, self._device_free_s))


@contextmanager
def sides(engines: Engines, shape: EngineShape) -> Iterator[tuple[Side, Side]]:
    """Ours and vLLM's own, from one configuration."""
    path = LinkPath()
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(path.address)
    clock = [100.0]
    hooked = engines.production(shape, path.address, lambda: clock[0])
    try:
        yield Side(hooked, shape, clock, socket), Side(engines.plain(shape), shape, [100.0], None)
    finally:
        hooked.shutdown()
        socket.close()
        path.close()
