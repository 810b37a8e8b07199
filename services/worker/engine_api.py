"""What the worker service asks of an engine, whichever it is (`vllm` or `emulated`).

Times are monotonic seconds of this host: the engine process and the worker process share that clock.
"""

import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from services.core.constraint import Constraint
from services.core.perf_model import BatchShape, PerfModel
from services.core.slo import StageSlo, VerdictMode
from services.worker.profile_store import ReplicaProfile

__all__ = [
    "Engine",
    "EngineEnd",
    "EngineInfo",
    "EngineOutput",
    "EngineReport",
    "RequestDecision",
    "RequestProgress",
    "SamplingSpec",
    "Submission",
]


class EngineEnd(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """Sampling of one request; `None` means the model's own default. Stop strings are admission's business."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Submission:
    """One attempt of a request as it enters the engine.

    `token_ids` is the original prompt followed by the tokens earlier attempts delivered; `sampling.max_tokens` counts
    only what is still to be generated. `first_token_s` is set where an earlier attempt already delivered a first token:
    the decode deadlines then count from it.
    """

    request_id: str
    attempt: int
    application: str
    token_ids: tuple[int, ...]
    delivered_tokens: int
    prompt_digest: str
    sampling: SamplingSpec
    stages: tuple[StageSlo, ...]
    tiers: tuple[str, ...]  # of each stage
    promised: bool
    ttft_deadline_s: float
    arrival_s: float
    forecast_tokens: int
    first_token_s: float | None = None
    traceparent: str = ""
    tracestate: str = ""
    pending: bool = False  # not decided: the hook decides it, as `verdict_mode` says, and reports
    verdict_mode: VerdictMode = VerdictMode.FIRM
    weight: int = 1  # of its application, where not all pending requests fit
    accepted_at_s: float = math.nan  # when it was handed to the engine
    delivery_spread_s: float = 0.0  # how much later than a first token a last one may reach its client


@dataclass(frozen=True, slots=True)
class EngineOutput:
    """New tokens of one request from one engine step; `end` is set on the last one."""

    request_id: str
    token_ids: tuple[int, ...]
    emitted_at_s: float
    end: EngineEnd | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine turned out to be, known once it has started."""

    model: str
    max_model_len: int
    total_blocks: int
    block_size: int
    max_num_seqs: int
    async_scheduling: bool
    eos_token_ids: tuple[int, ...] = ()
    max_batch_tokens: int = 0  # 0: unknown
    max_verify_tokens: int = 1  # most tokens a step verifies for one request; 1: it drafts nothing


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """One request as the scheduler hook sees it (the core of `EngineRequest` on the wire)."""

    request_id: str
    attempt: int
    application: str
    tier: str
    promised: bool
    started: bool
    prompt_tokens: int
    computed_tokens: int
    output_tokens: int
    forecast_tokens: int
    max_tokens: int
    ttft_deadline_s: float
    next_deadline_s: float
    tpot_s: float
    scheduled_at_s: float | None = None  # start of its prefill
    accepted_at_s: float = math.nan  # when it was handed to the engine


@dataclass(frozen=True, slots=True)
class RequestDecision:
    """The hook's verdict on a pending request: promised from now on, or best effort; or a promise that is lost.

    Predictions are those of the plan that decided (infinite or NaN where it had none). `tier` is the name of the tier
    the constraint concerns. `retry_after_s`: how much later the same SLO would have been promised, 0 where unknown.
    """

    request_id: str
    attempt: int
    admitted: bool
    predicted_ttft_s: float
    predicted_tpot_s: float
    constraint: Constraint
    tier: str = ""
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the hook says after a step. `requests` holds all of them when `full`, else the new and changed ones."""

    step: int
    observed_at_s: float
    full: bool
    requests: tuple[RequestProgress, ...]
    removed_ids: tuple[str, ...]
    free_blocks: int
    engine_free_at_s: float
    running: int
    waiting: int
    best_effort: int
    best_effort_prefill_tokens: int  # of best-effort requests not yet prefilled
    preemptions: int  # so far
    token_budget: int  # of the last batch
    batches: tuple[tuple[BatchShape, float], ...] = field(default=())  # executed since the last report, with seconds
    perf_model: PerfModel | None = None  # when it changed
    acceptance: Mapping[str, float] | None = None  # of draft tokens, by application; when it changed
    demoted: tuple[RequestDecision, ...] = ()  # their promises cannot be kept any more
    decided: tuple[RequestDecision, ...] = ()
    released_ids: tuple[str, ...] = ()  # their first tokens need not be held
    pauses: int = 0  # so far: preemptions of promised decoders that were far ahead


class Engine(Protocol):
    """A replica's engine. Every method is called from the worker's event loop."""

    @property
    def info(self) -> EngineInfo:
        """What the engine turned out to be; valid after `start`."""
        ...

    @property
    def perf_model(self) -> PerfModel:
        """The performance model in force; valid after `start`."""
        ...

    @property
    def profile(self) -> ReplicaProfile:
        """Where the performance model came from; R2 is 1.0 where the engine is the model itself."""
        ...

    async def start(self) -> None:
        """Load the model, install the scheduler hook, profile (or load the cached profile), and be ready."""
        ...

    def generate(self, submission: Submission) -> AsyncIterator[EngineOutput]:
        """Run one request; one output per engine step that gave it tokens. Closing the iterator aborts it."""
        ...

    async def abort(self, request_id: str) -> None:
        """Free the request's KV blocks within one engine step; its iterator ends with `EngineEnd.ABORTED`."""
        ...

    def promote(self, request_id: str, tier: str) -> None:
        """Make a best-effort request a promised one, from the next step on."""
        ...

    def reforecast(self, request_id: str, output_tokens: int) -> None:
        """Expect a request's attempt to produce `output_tokens` in all, from the next step on."""
        ...

    def set_duration_cap(self, seconds: float | None) -> None:
        """Cap the duration of batches from the next step on; `None` lifts the cap."""
        ...

    def expect_promises(self) -> None:
        """Keep batches short from the next step on, for as long as after a promise."""
        ...

    def request_snapshot(self) -> None:
        """Ask the hook for a full report."""
        ...

    def reports(self) -> AsyncIterator[EngineReport]:
        """Reports of the hook, in order. One consumer."""
        ...

    async def wait_dead(self) -> None:
        """Return once the engine is gone without having been stopped; nothing runs on it any more."""
        ...

    async def stop(self) -> None:
        """Stop the engine process."""
        ...
