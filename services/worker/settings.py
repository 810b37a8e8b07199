"""What a worker process is told."""

import json
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from services.common.config import ServiceSettings
from services.common.telemetry import traces_endpoint
from services.core.admission import Policy
from services.core.best_effort import BEST_EFFORT_PATIENCE_S
from services.core.presets import PRESETS
from services.core.speculation import MAX_VERIFY_TOKENS
from services.core.verdict import EARLY_PROMPT_TOKENS
from services.core.view import EARLY_SPEND, PlanSettings
from services.worker.engine_settings import EngineSettings
from services.worker.extra_arguments import check_extra_arguments
from services.worker.hook_config import ATTAINMENT_FLOOR

__all__ = ["WorkerSettings"]

ReplicaId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class WorkerSettings(ServiceSettings):
    """Environment variables `SLOS_*` of a worker.

    replica_id: name of this replica; part of its queues' names, so it must be unique in the fleet.
    advertise: address other services reach this worker at, written in its lease; host:port where empty.
    planners: addresses of all planners of the fleet; rendezvous hashing picks this replica's.
    engine: `vllm` runs the model; `emulated` runs the real engine around an executor that only takes the modelled time.
    model: directory or hub id.
    preset: name of the emulated hardware and model (`emulated` only).
    kv_blocks, block_size, max_num_seqs, max_model_len, max_batch_tokens, cpu_threads: 0 leaves the choice to the
        engine, the model or the preset.
    kv_cache_gib: memory for the KV cache of a CPU engine; 0 leaves the choice to the engine.
    gpu_memory_share: share of a GPU's memory for weights and KV cache; 0 leaves the choice to the engine.
    engine_args: vLLM's own engine arguments as a JSON object, by vLLM's names; those that a setting here stands for
        are refused, and empty is none (`vllm` only).
    weights: `dummy` runs the model's shape with random values, for measurements (`vllm` only).
    async_scheduling: two batches in flight; `auto` is the engine's own choice, and off with `speculation`.
    profile_s: about how long a replica without a cached profile measures itself.
    policy: how to choose among pending requests that do not all fit.
    early_prompt_tokens: pending prompts up to this long are promised as soon as a plan holds them.
    attainment_floor: pending requests of an application whose attainment here is below this count ten times as heavy;
        0 switches it off.
    speculation: `ngram` drafts tokens from what the request repeats; how many a tier verifies is decided step by step.
    speculation_tokens: draft tokens proposed per step, at most.
    emulated_acceptance: share of draft tokens that are right (`emulated` only).
    early_spend: in a conflict, promised decodes may be late by this share of their remaining TPOT budget and catch up.
    hold_first_token: promised first tokens may leave as late as their deadline while prefills wait.
    pausing: promised decoders that are far ahead of their deadlines may be preempted for a while where memory is short.
    best_effort_patience_s: how long best effort waits for what is left over before it is planned among the promises.
    lease_s: how long the replica stays known without a sign of life.
    retention_s: how long output nobody has collected is kept after its end.
    """

    port: Annotated[int, Field(ge=0, le=65535)] = 50061
    replica_id: ReplicaId = "w0"
    advertise: str = ""
    planners: Annotated[tuple[str, ...], NoDecode] = ("127.0.0.1:50053",)
    engine: Literal["vllm", "emulated"] = "vllm"
    model: Annotated[str, Field(min_length=1)] = "models/tiny"
    preset: str = "qwen2.5-7b-a100"
    kv_blocks: Annotated[int, Field(ge=0)] = 0
    block_size: Annotated[int, Field(ge=0, le=256)] = 0
    max_num_seqs: Annotated[int, Field(ge=0, le=8192)] = 0
    max_model_len: Annotated[int, Field(ge=0)] = 0
    max_batch_tokens: Annotated[int, Field(ge=0, le=131072)] = 0
    engine_args: Annotated[dict[str, JsonValue], NoDecode] = Field(default_factory=dict)
    weights: Literal["auto", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cpu_threads: Annotated[int, Field(ge=0, le=1024)] = 0
    kv_cache_gib: Annotated[float, Field(ge=0, le=4096)] = 0.0
    gpu_memory_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    async_scheduling: Literal["auto", "on", "off"] = "auto"
    profile_s: Annotated[float, Field(ge=1, le=600)] = 8.0
    policy: Policy = Policy.MH
    early_prompt_tokens: Annotated[int, Field(ge=0)] = EARLY_PROMPT_TOKENS
    attainment_floor: Annotated[float, Field(ge=0, lt=1)] = ATTAINMENT_FLOOR
    speculation: Literal["off", "ngram"] = "off"
    speculation_tokens: Annotated[int, Field(ge=1, le=MAX_VERIFY_TOKENS - 1)] = MAX_VERIFY_TOKENS - 1
    emulated_acceptance: Annotated[float, Field(ge=0, le=1)] = 0.6
    early_spend: Annotated[float, Field(ge=0, lt=1)] = EARLY_SPEND
    hold_first_token: bool = False
    pausing: bool = True
    best_effort_patience_s: Annotated[float, Field(gt=0, le=86_400)] = BEST_EFFORT_PATIENCE_S
    lease_s: Annotated[float, Field(ge=0.5, le=60)] = 3.0
    retention_s: Annotated[float, Field(ge=1, le=3600)] = 60.0

    @field_validator("planners", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("planners")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one planner as host:port")
        for address in value:
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"{address!r} is not host:port")
        return value

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str, info: ValidationInfo) -> str:
        known = sorted(preset.name for preset in PRESETS)
        if info.data.get("engine") == "emulated" and value not in known:
            raise ValueError(f"preset {value!r} is unknown; known: {', '.join(known)}")
        return value

    @field_validator("engine_args", mode="before")
    @classmethod
    def _json_object(cls, value: object) -> object:
        try:
            return json.loads(value or "{}") if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None

    @field_validator("engine_args")
    @classmethod
    def _free_arguments(cls, value: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if value and info.data.get("engine") == "emulated":
            raise ValueError("the emulated engine has no use for vLLM's arguments")
        check_extra_arguments(value)
        return value

    @field_validator("speculation")
    @classmethod
    def _one_batch_in_flight(cls, value: str, info: ValidationInfo) -> str:
        if value == "ngram" and info.data.get("async_scheduling") == "on":
            raise ValueError(
                "vLLM drafts from n-grams with one batch in flight only: SLOS_ASYNC_SCHEDULING must be off"
            )
        return value

    def engine_settings(self) -> EngineSettings:
        """The part of them that the engine is started with."""
        return EngineSettings(
            engine=self.engine,
            model=self.model,
            data_dir=self.data_dir,
            preset=self.preset,
            kv_blocks=self.kv_blocks or None,
            block_size=self.block_size or None,
            max_num_seqs=self.max_num_seqs or None,
            max_model_len=self.max_model_len or None,
            max_batch_tokens=self.max_batch_tokens or None,
            weights=self.weights,
            dtype=self.dtype,
            cpu_threads=self.cpu_threads or None,
            kv_cache_gib=self.kv_cache_gib or None,
            gpu_memory_share=self.gpu_memory_share or None,
            extra=self.engine_args,
            async_scheduling=self._async_scheduling,
            profile_s=self.profile_s,
            otlp_endpoint=traces_endpoint(),
            policy=self.policy,
            early_prompt_tokens=self.early_prompt_tokens,
            attainment_floor=self.attainment_floor,
            speculation_tokens=self.speculation_tokens if self.speculation != "off" else 0,
            emulated_acceptance=self.emulated_acceptance,
            plan=PlanSettings(hold_first_token=self.hold_first_token, early_spend=self.early_spend),
            patience_s=self.best_effort_patience_s,
            pausing=self.pausing,
        )

    @property
    def _async_scheduling(self) -> bool | None:
        if self.speculation != "off":
            return False
        return None if self.async_scheduling == "auto" else self.async_scheduling == "on"
