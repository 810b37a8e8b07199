"""A validated request as it will travel in the queue."""

import hashlib
from array import array
from collections.abc import Sequence

from protos import admission_pb2, types_pb2
from services.admission.tokens import ModelTokens
from services.admission.transcript import OutputRules
from services.admission.validate import ValidRequest
from services.common.telemetry import TraceContext
from services.common.wire import stage_to_wire, stages_from_wire, verdict_mode_to_wire
from services.core.slo import StageSlo

__all__ = ["body_digest", "output_rules", "queued_request"]

_TAIL_IDS = 12
"""Last ids of the prompt that the output's text may depend on."""


def body_digest(request: admission_pb2.GenerateRequest) -> str:
    """Digest of everything the client sent but the id: a retry has the same, another request a different one."""
    body = admission_pb2.GenerateRequest()
    body.CopyFrom(request)
    body.ClearField("request_id")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()


def queued_request(
    valid: ValidRequest,
    stages: Sequence[StageSlo],
    tiers: Sequence[str],
    tokens: ModelTokens,
    *,
    request_id: str,
    tenant: str,
    admission_id: str,
    arrival_us: int,
    delivery_lag_s: float,
    delivery_spread_s: float,
    client_deadline_us: int,
    trace: TraceContext,
) -> types_pb2.QueuedRequest:
    """The first attempt of a request. Tier, promise and predictions are the router's to fill.

    The first-token deadline is the engine's: `delivery_lag_s` before the client's. `delivery_spread_s` is kept in hand
    of decode deadlines.
    """
    ttft_s = stages[0].ttft_s or 0.0
    return types_pb2.QueuedRequest(
        request_id=request_id,
        attempt=1,
        tenant=tenant,
        application=valid.application,
        admission_id=admission_id,
        prompt_token_ids=valid.prompt_ids,
        sampling=valid.sampling,
        stages=[stage_to_wire(stage, tier) for stage, tier in zip(stages, tiers, strict=True)],
        arrival_us=arrival_us,
        ttft_deadline_us=arrival_us + round((ttft_s - delivery_lag_s) * 1e6),
        stop_token_ids=() if valid.sampling.ignore_eos else tokens.stop_token_ids,
        traceparent=trace.traceparent,
        tracestate=trace.tracestate,
        client_deadline_us=client_deadline_us,
        prompt_digest=hashlib.sha256(array("I", valid.prompt_ids).tobytes()).hexdigest(),
        verdict_mode=verdict_mode_to_wire(valid.verdict_mode),
        delivery_spread_us=round(delivery_spread_s * 1e6),
        resume_grace_us=round(valid.resume_grace_s * 1e6),
    )


def output_rules(queued: types_pb2.QueuedRequest, tokens: ModelTokens, last_stage_limit: int | None) -> OutputRules:
    """How the output of a queued request becomes text: the same in whichever process reads it."""
    return OutputRules(
        stages=stages_from_wire(queued.stages),
        prompt_tail=tuple(queued.prompt_token_ids[-_TAIL_IDS:]),
        silent_ids=tokens.silent_ids,
        stops=tuple(queued.sampling.stop),
        min_tokens=queued.sampling.min_tokens,
        last_stage_limit=last_stage_limit,
    )
