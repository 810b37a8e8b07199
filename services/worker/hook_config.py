"""What the scheduler hook is told when the engine starts, through vLLM's `additional_config`."""

from dataclasses import replace
from typing import Any

import msgspec

from services.core.admission import Policy
from services.core.best_effort import BEST_EFFORT_PATIENCE_S
from services.core.perf_model import PerfModel, Segment
from services.core.verdict import EARLY_PROMPT_TOKENS
from services.core.view import PlanSettings
from services.worker.link import ModelTerms

__all__ = [
    "ATTAINMENT_FLOOR",
    "CONFIG_KEY",
    "EmulationTerms",
    "HookConfig",
    "from_additional_config",
    "model_of",
    "model_terms",
]

CONFIG_KEY = "slos"
ATTAINMENT_FLOOR = 0.85


class EmulationTerms(msgspec.Struct, frozen=True):
    """What the emulated executor imitates: a performance model, and a vocabulary to draw tokens from.

    `acceptance` is the share of its draft tokens that are right, where it speculates.
    """

    model: ModelTerms
    vocab_size: int
    special_ids: tuple[int, ...]
    acceptance: float = 0.6


class HookConfig(msgspec.Struct, frozen=True):
    """`address` is the link's socket. Without a `model` nothing is planned until a directive brings one.

    `lapse_s`: this long after the last promise, batches are no longer shortened for promises to come.
    `report_interval_s`: reports of mere progress are at least this far apart. `policy` chooses among pending requests,
    `early_prompt_tokens` is how long a prompt may be to be promised before its prefill starts, `attainment_floor` the
    attainment below which an application's pending requests count ten times as heavy (0: never). `patience_s`: how long
    best effort waits for what is left over before it is planned among the promises. `pausing`: promised decoders that
    are far ahead may be preempted for a while where memory is short.
    """

    address: str
    plan: PlanSettings
    model: ModelTerms | None = None
    lapse_s: float = 5.0
    report_interval_s: float = 0.02
    emulation: EmulationTerms | None = None
    policy: Policy = Policy.MH
    early_prompt_tokens: int = EARLY_PROMPT_TOKENS
    attainment_floor: float = ATTAINMENT_FLOOR
    patience_s: float = BEST_EFFORT_PATIENCE_S
    pausing: bool = True

    def plan_settings(self, max_batch_tokens: int) -> PlanSettings:
        """The core's settings; the engine's own limit on tokens per batch wins."""
        return replace(self.plan, max_batch_tokens=max_batch_tokens)

    def additional_config(self) -> dict[str, Any]:
        """The value for vLLM's `additional_config`."""
        return {CONFIG_KEY: msgspec.to_builtins(self)}


def from_additional_config(additional_config: Any) -> HookConfig:
    """The hook's part of vLLM's `additional_config`; ValueError if it is not there."""
    raw = additional_config.get(CONFIG_KEY) if isinstance(additional_config, dict) else None
    if raw is None:
        raise ValueError(f"additional_config has no {CONFIG_KEY!r}: the engine was not started by the worker")
    return msgspec.convert(raw, HookConfig)


def model_of(terms: ModelTerms) -> PerfModel:
    """The core's performance model."""
    return PerfModel(tuple(Segment(*row) for row in terms.rows), terms.margin_s, terms.r2, terms.attention)


def model_terms(model: PerfModel) -> ModelTerms:
    """The model as it crosses the link."""
    return ModelTerms(model.rows, model.margin_s, model.r2, model.attention)
