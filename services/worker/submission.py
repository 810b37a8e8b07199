"""From a queue entry to what the engine is given."""

from protos import types_pb2
from services.common.clock import Clock
from services.common.wire import stages_from_wire, verdict_mode_from_wire
from services.core.lengths import LengthForecaster
from services.core.slo import BEST_EFFORT
from services.worker.engine_api import EngineInfo, SamplingSpec, Submission
from services.worker.output import OutputEnd

__all__ = ["submission_of"]


def submission_of(
    request: types_pb2.QueuedRequest, info: EngineInfo, forecaster: LengthForecaster, clock: Clock, weight: int = 1
) -> Submission | OutputEnd:
    """One attempt of a request for the engine, or how it ended without one.

    Tokens that earlier attempts delivered become part of the prompt and count against max_tokens; an attempt that
    failed between its last token and its end leaves nothing to do. Raises SloServeError where the entry contradicts
    itself.
    """
    end = _already_ended(request, info, clock)
    if end is not None:
        return end
    prompt = (*request.prompt_token_ids, *request.delivered_token_ids)
    room = info.max_model_len - len(prompt)
    if room < 1:
        return OutputEnd(
            types_pb2.FINISH_REASON_ERROR,
            f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {info.max_model_len}",
        )
    max_tokens = min(room, _remaining(request, room))
    forecast = forecaster.forecast(request.application, len(request.prompt_token_ids), max_tokens)
    return Submission(
        request_id=request.request_id,
        attempt=request.attempt,
        application=request.application,
        token_ids=prompt,
        delivered_tokens=len(request.delivered_token_ids),
        prompt_digest=request.prompt_digest,
        sampling=_sampling(request, max_tokens),
        stages=stages_from_wire(request.stages),
        tiers=tuple(stage.tier for stage in request.stages),
        promised=request.promised,
        pending=request.pending and request.tier != BEST_EFFORT,
        verdict_mode=verdict_mode_from_wire(request.verdict_mode),
        ttft_deadline_s=clock.to_monotonic_s(request.ttft_deadline_us),
        arrival_s=clock.to_monotonic_s(request.arrival_us),
        forecast_tokens=forecast.mean_tokens,
        weight=weight,
        accepted_at_s=clock.now_s(),
        delivery_spread_s=max(0.0, request.delivery_spread_us / 1e6),
        first_token_s=clock.to_monotonic_s(request.first_token_us) if request.HasField("first_token_us") else None,
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )


def _already_ended(request: types_pb2.QueuedRequest, info: EngineInfo, clock: Clock) -> OutputEnd | None:
    late_us = clock.now_us() - request.client_deadline_us
    if request.client_deadline_us and late_us > 0:
        return OutputEnd(
            types_pb2.FINISH_REASON_ERROR,
            f"the client's deadline passed {late_us / 1000:.0f} ms before a worker took the request",
        )
    delivered = request.delivered_token_ids
    if not delivered:
        return None
    if _remaining(request, 1) < 1:
        return OutputEnd(types_pb2.FINISH_REASON_LENGTH)
    end_ids = set(request.stop_token_ids) | (set() if request.sampling.ignore_eos else set(info.eos_token_ids))
    return OutputEnd(types_pb2.FINISH_REASON_STOP) if delivered[-1] in end_ids else None


def _remaining(request: types_pb2.QueuedRequest, otherwise: int) -> int:
    """Tokens its max_tokens leaves; `otherwise` without a limit."""
    if not request.sampling.HasField("max_tokens"):
        return otherwise
    return request.sampling.max_tokens - len(request.delivered_token_ids)


def _sampling(request: types_pb2.QueuedRequest, max_tokens: int) -> SamplingSpec:
    wire = request.sampling
    return SamplingSpec(
        max_tokens=max_tokens,
        temperature=wire.temperature if wire.HasField("temperature") else None,
        top_p=wire.top_p if wire.HasField("top_p") else None,
        top_k=wire.top_k if wire.HasField("top_k") else None,
        seed=wire.seed if wire.HasField("seed") else None,
        presence_penalty=wire.presence_penalty if wire.HasField("presence_penalty") else None,
        frequency_penalty=wire.frequency_penalty if wire.HasField("frequency_penalty") else None,
        repetition_penalty=wire.repetition_penalty if wire.HasField("repetition_penalty") else None,
        min_tokens=max(0, wire.min_tokens - len(request.delivered_token_ids)),
        ignore_eos=wire.ignore_eos,
        stop_token_ids=tuple(request.stop_token_ids),
    )
