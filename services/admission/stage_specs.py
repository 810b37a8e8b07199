"""Stages as a client or the catalogue states them, turned into core stages (slowdowns not yet resolved)."""

from collections.abc import Sequence
from dataclasses import dataclass

from protos import types_pb2
from services.admission.tokens import ModelTokens
from services.admission.violations import Violations
from services.common.config import Application, Catalogue, ConfigError
from services.common.wire import stage_kind_from_wire
from services.core.slo import StageKind, StageSlo

__all__ = ["StatedStage", "application_stages", "check_catalogue", "explicit_stages", "stage_slos"]

MAX_STAGES = 8
MAX_SLO_MS = 3_600_000.0
MAX_SLOWDOWN = 1000.0

_END_TOKENS = {StageKind.THINK: "</think>", StageKind.TOOL_CALL: "</tool_call>"}
"""How models mark the end of such stages where the catalogue does not say otherwise."""


@dataclass(frozen=True, slots=True)
class StatedStage:
    """One stage as stated. `max_tokens` 0: what the request's own limit leaves."""

    kind: StageKind
    ttft_ms: float | None
    ttft_slowdown: float | None
    tpot_ms: float
    max_tokens: int
    end_token_id: int | None


def application_stages(application: Application, tokens: ModelTokens) -> tuple[StatedStage, ...]:
    """The stages of a configured application."""
    return tuple(
        StatedStage(
            stage.kind,
            stage.ttft_ms,
            stage.ttft_slowdown,
            stage.tpot_ms,
            stage.max_tokens,
            None if stage.end_token is None else tokens.token_id(stage.end_token),
        )
        for stage in application.stages
    )


def check_catalogue(catalogue: Catalogue, tokens: ModelTokens) -> None:
    """`ConfigError` where a stage of an application could never end on this model."""
    for name, application in catalogue.applications.items():
        for index, stage in enumerate(application_stages(application, tokens)[:-1]):
            if stage.max_tokens == 0 and stage.end_token_id is None:
                raise ConfigError(
                    f"SLOS_CATALOGUE: applications.{name}.stages.{index}: needs max_tokens, or an end_token that is "
                    f"one token of this model's vocabulary"
                )


def explicit_stages(
    specs: Sequence[types_pb2.StageSpec], application: Application | None, tokens: ModelTokens, violations: Violations
) -> tuple[StatedStage, ...]:
    """The stages of a message. Every violation is noted; the result is usable only if there was none."""
    violations.require(len(specs) <= MAX_STAGES, "stages", f"at most {MAX_STAGES}, got {len(specs)}")
    ends = {stage.kind: stage.end_token for stage in reversed(application.stages)} if application else {}
    stated: list[StatedStage] = []
    for index, spec in enumerate(specs[:MAX_STAGES]):
        _check_spec(spec, index, violations)
        kind = stage_kind_from_wire(spec.kind)
        end_token = ends.get(kind) or _END_TOKENS.get(kind)
        end_token_id = None if end_token is None else tokens.token_id(end_token)
        if index < len(specs) - 1 and spec.max_tokens == 0 and end_token_id is None:
            violations.add(f"stages[{index}].max_tokens", f"needed: the model has no token that ends a {kind} stage")
        given = spec.WhichOneof("ttft")
        stated.append(
            StatedStage(
                kind,
                spec.ttft_ms if given == "ttft_ms" else None,
                spec.ttft_slowdown if given == "ttft_slowdown" else None,
                spec.tpot_ms,
                spec.max_tokens,
                end_token_id,
            )
        )
    return tuple(stated)


def _check_spec(spec: types_pb2.StageSpec, index: int, violations: Violations) -> None:
    where = f"stages[{index}]"
    violations.require(
        spec.kind in types_pb2.StageKind.values(), f"{where}.kind", f"{spec.kind} is no stage kind of this version"
    )
    violations.within(spec.tpot_ms, f"{where}.tpot_ms", 0, MAX_SLO_MS, unit="ms", above_low=True)
    given = spec.WhichOneof("ttft")
    if index > 0:
        violations.require(
            given is None, f"{where}.{given}", "only the first stage has a first token of its own: leave it out"
        )
    elif given is None:
        violations.add(f"{where}.ttft_ms", "the first stage needs ttft_ms or ttft_slowdown")
    elif given == "ttft_ms":
        violations.within(spec.ttft_ms, f"{where}.ttft_ms", 0, MAX_SLO_MS, unit="ms", above_low=True)
    else:
        violations.within(spec.ttft_slowdown, f"{where}.ttft_slowdown", 1, MAX_SLOWDOWN)


def stage_slos(stated: Sequence[StatedStage], max_tokens: int) -> tuple[StageSlo, ...]:
    """Core stages of a request that may generate `max_tokens`: every open limit is set to what is left."""
    slos: list[StageSlo] = []
    left = max_tokens
    for stage in stated:
        limit = max(1, min(stage.max_tokens or left, left))
        left -= limit
        slos.append(
            StageSlo(
                kind=stage.kind,
                ttft_s=None if stage.ttft_ms is None else stage.ttft_ms / 1000,
                ttft_slowdown=stage.ttft_slowdown,
                tpot_s=stage.tpot_ms / 1000,
                max_tokens=limit,
                end_token_id=stage.end_token_id,
            )
        )
    return tuple(slos)
