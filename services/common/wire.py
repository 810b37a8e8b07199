"""Protobuf messages to core values and back.

Wire times are Unix microseconds, core times monotonic seconds of this process: `Clock` converts. Tiers travel by name
and are indices in the core, `best-effort` being -1. Whatever cannot mean anything (an unknown tier, a NaN coefficient,
a stage without tokens) raises `SloServeError` with reason STATE_INVALID.
"""

import math
from collections.abc import Iterable, Sequence

from protos import planner_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.constraint import Constraint, ConstraintKind
from services.core.errors import CoreError
from services.core.perf_model import PerfModel, Segment
from services.core.slo import BEST_EFFORT, StageKind, StageSlo, Tier, VerdictMode
from services.core.speculation import MAX_VERIFY_TOKENS, Drafts
from services.core.view import BEST_EFFORT_TIER, Decoder, Prefill

__all__ = [
    "constraint_to_wire",
    "decodes",
    "drafts_from_wire",
    "drafts_to_wire",
    "engine_request_from_wire",
    "perf_model_from_wire",
    "perf_model_to_wire",
    "stage_from_wire",
    "stage_kind_from_wire",
    "stage_kind_to_wire",
    "stage_to_wire",
    "stages_from_wire",
    "tier_index",
    "tier_name",
    "verdict_mode_from_wire",
    "verdict_mode_to_wire",
]

_STAGE_KINDS: dict[StageKind, types_pb2.StageKind.ValueType] = {
    StageKind.THINK: types_pb2.STAGE_KIND_THINK,
    StageKind.TOOL_CALL: types_pb2.STAGE_KIND_TOOL_CALL,
    StageKind.ANSWER: types_pb2.STAGE_KIND_ANSWER,
}
_VERDICT_MODES: dict[VerdictMode, types_pb2.VerdictMode.ValueType] = {
    VerdictMode.EARLY: types_pb2.VERDICT_MODE_EARLY,
    VerdictMode.LATE: types_pb2.VERDICT_MODE_LATE,
    VerdictMode.FIRM: types_pb2.VERDICT_MODE_FIRM,
}
_CORE_VERDICT_MODES = {wire: mode for mode, wire in _VERDICT_MODES.items()}
_CORE_STAGE_KINDS = {wire: kind for kind, wire in _STAGE_KINDS.items()}

_CONSTRAINT_KINDS: dict[ConstraintKind, types_pb2.ConstraintKind.ValueType] = {
    ConstraintKind.NONE: types_pb2.CONSTRAINT_KIND_UNSPECIFIED,
    ConstraintKind.KV_BLOCKS: types_pb2.CONSTRAINT_KIND_KV_BLOCKS,
    ConstraintKind.PREFILL_BUDGET: types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET,
    ConstraintKind.TPOT: types_pb2.CONSTRAINT_KIND_TPOT,
    ConstraintKind.HOPELESS: types_pb2.CONSTRAINT_KIND_HOPELESS,
    ConstraintKind.MAX_SEQS: types_pb2.CONSTRAINT_KIND_MAX_SEQS,
}


def _invalid(text: str) -> SloServeError:
    return SloServeError(Reason.STATE_INVALID, text)


def tier_index(name: str, tiers: Sequence[Tier]) -> int:
    """Index of a tier by name; -1 for `best-effort`."""
    if name == BEST_EFFORT:
        return BEST_EFFORT_TIER
    for index, tier in enumerate(tiers):
        if tier.name == name:
            return index
    known = ", ".join(tier.name for tier in tiers)
    raise _invalid(f"tier {name!r} is not configured (known: {known}, {BEST_EFFORT})")


def tier_name(index: int, tiers: Sequence[Tier]) -> str:
    """Name of a tier by index; `best-effort` for -1."""
    return BEST_EFFORT if index == BEST_EFFORT_TIER else tiers[index].name


def perf_model_to_wire(model: PerfModel) -> types_pb2.PerfModel:
    """A performance model as it travels; an unknown R2 is 0."""
    segments = [
        types_pb2.PerfSegment(k_tok=s.k_tok, k_ctx=s.k_ctx, k_req=s.k_req, k_step=s.k_step, b=s.b)
        for s in model.segments
    ]
    return types_pb2.PerfModel(
        segments=segments, margin_s=model.margin_s, r2=model.r2 or 0.0, attention=model.attention
    )


def perf_model_from_wire(wire: types_pb2.PerfModel) -> PerfModel:
    """The core's model; coefficients that are NaN, negative, or never grow with tokens are refused."""
    try:
        segments = tuple(Segment(s.k_tok, s.k_ctx, s.k_req, s.k_step, s.b) for s in wire.segments)
        return PerfModel(segments, wire.margin_s, wire.r2 or None, wire.attention)
    except CoreError as error:
        raise _invalid(f"perf_model: {error}") from None


def drafts_to_wire(drafts: Drafts) -> planner_pb2.Drafts:
    """What an engine drafts, as it travels."""
    return planner_pb2.Drafts(max_verify_tokens=drafts.max_verify_tokens, acceptance=dict(drafts.acceptance))


def drafts_from_wire(wire: planner_pb2.Drafts) -> Drafts:
    """The core's drafts; a rate that is none, or more tokens than the core plans with, are refused."""
    if wire.max_verify_tokens > MAX_VERIFY_TOKENS:
        raise _invalid(
            f"drafts: {wire.max_verify_tokens} tokens verified per step, at most {MAX_VERIFY_TOKENS} are planned"
        )
    acceptance = dict(wire.acceptance)
    for application, rate in sorted(acceptance.items()):
        if not 0.0 <= rate <= 1.0:
            raise _invalid(f"drafts: the acceptance rate of {application!r} is {rate}")
    return Drafts(max(1, wire.max_verify_tokens), acceptance)


def stage_kind_to_wire(kind: StageKind) -> types_pb2.StageKind.ValueType:
    """A stage's kind as it travels."""
    return _STAGE_KINDS[kind]


def stage_kind_from_wire(wire: types_pb2.StageKind.ValueType) -> StageKind:
    """The core's stage kind; an unspecified one is an ANSWER."""
    return _CORE_STAGE_KINDS.get(wire, StageKind.ANSWER)


def verdict_mode_to_wire(mode: VerdictMode) -> types_pb2.VerdictMode.ValueType:
    """When an application wants its verdict, as it travels."""
    return _VERDICT_MODES[mode]


def verdict_mode_from_wire(wire: types_pb2.VerdictMode.ValueType) -> VerdictMode:
    """The core's verdict mode; an unspecified one is FIRM."""
    return _CORE_VERDICT_MODES.get(wire, VerdictMode.FIRM)


def stage_to_wire(stage: StageSlo, tier: str) -> types_pb2.Stage:
    """A resolved stage (no slowdown left) of the named tier as it travels."""
    if stage.ttft_slowdown is not None:
        raise _invalid("a stage travels with its first-token SLO resolved to milliseconds")
    wire = types_pb2.Stage(
        kind=_STAGE_KINDS[stage.kind],
        ttft_ms=0.0 if stage.ttft_s is None else stage.ttft_s * 1000,
        tpot_ms=stage.tpot_s * 1000,
        max_tokens=stage.max_tokens,
        tier=tier,
    )
    if stage.end_token_id is not None:
        wire.end_token_id = stage.end_token_id
    return wire


def stage_from_wire(wire: types_pb2.Stage) -> StageSlo:
    """The core's stage. A TTFT of 0 means that it continues the stage before."""
    try:
        return StageSlo(
            kind=stage_kind_from_wire(wire.kind),
            ttft_s=wire.ttft_ms / 1000 if wire.ttft_ms else None,
            ttft_slowdown=None,
            tpot_s=wire.tpot_ms / 1000,
            max_tokens=wire.max_tokens,
            end_token_id=wire.end_token_id if wire.HasField("end_token_id") else None,
        )
    except CoreError as error:
        raise _invalid(f"stage: {error}") from None


def stages_from_wire(stages: Iterable[types_pb2.Stage]) -> tuple[StageSlo, ...]:
    """The stages of a request; there must be at least one."""
    found = tuple(stage_from_wire(stage) for stage in stages)
    if not found:
        raise _invalid("a request has at least one stage")
    return found


def constraint_to_wire(constraint: Constraint, tiers: Sequence[Tier]) -> types_pb2.Constraint:
    """A binding constraint as it travels: seconds become milliseconds, a number the core does not state becomes 0."""
    fits = constraint.kind is ConstraintKind.NONE
    scale = 1000.0 if constraint.unit == "s" else 1.0
    tier = tier_name(constraint.tier, tiers) if constraint.tier >= 0 else ""
    return types_pb2.Constraint(
        kind=_CONSTRAINT_KINDS[constraint.kind],
        needed=_finite(constraint.needed * scale),
        available=_finite(constraint.available * scale),
        tier=tier,
        # The core knows tiers by index only; people know them by name.
        detail="" if fits else constraint.sentence.replace(f"tier {constraint.tier}:", f"tier {tier}:"),
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def decodes(request: planner_pb2.EngineRequest) -> bool:
    """True where only its next token is missing: it has output, and all but the newest token is in KV.

    A preempted request has output too, but must be prefilled again.
    """
    return request.output_tokens > 0 and request.computed_tokens + 1 >= request.prompt_tokens


def engine_request_from_wire(
    request: planner_pb2.EngineRequest, tiers: Sequence[Tier], clock: Clock
) -> Decoder | Prefill:
    """A request in the engine as the core plans it.

    A preempted request is a prefill again whose deadline is that of its next token.
    """
    tier = tier_index(request.tier, tiers)
    tpot_s = request.tpot_ms / 1000
    if tier != BEST_EFFORT_TIER and not (math.isfinite(tpot_s) and tpot_s > 0):
        raise _invalid(f"request {request.request_id}: tpot_ms is {request.tpot_ms}")
    promised = request.promised and tier != BEST_EFFORT_TIER
    expected = max(1, request.forecast_tokens)
    if decodes(request):
        return Decoder(
            id=request.request_id,
            tier=tier,
            next_deadline_s=clock.to_monotonic_s(request.next_deadline_us),
            tpot_s=tpot_s,
            context_tokens=request.computed_tokens,
            remaining_tokens=expected,
            promised=promised,
        )
    due_us = request.next_deadline_us if request.output_tokens else request.ttft_deadline_us
    return Prefill(
        id=request.request_id,
        tier=tier,
        deadline_s=clock.to_monotonic_s(due_us),
        tpot_s=tpot_s,
        prompt_tokens=max(1, request.prompt_tokens),
        computed_tokens=min(request.computed_tokens, max(1, request.prompt_tokens)),
        output_tokens=expected,
        promised=promised,
        started=request.started,
        application=request.application,
    )
