"""A queued request as the planner is asked about it: what is left of it, and when its next token is due."""

from protos import planner_pb2, types_pb2
from services.common.wire import stages_from_wire
from services.core.stages import StageTracker

__all__ = ["candidate_of", "current_stage", "output_tokens"]


def _tracker(request: types_pb2.QueuedRequest) -> StageTracker:
    tracker = StageTracker(stages_from_wire(request.stages))
    tracker.advance(request.delivered_token_ids)
    return tracker


def current_stage(request: types_pb2.QueuedRequest) -> types_pb2.Stage:
    """The stage that the next token belongs to."""
    return request.stages[_tracker(request).stage_index]


def candidate_of(request: types_pb2.QueuedRequest) -> planner_pb2.Candidate:
    """The candidate of a request, delivered tokens counted as prompt.

    Where an earlier attempt has delivered tokens, only the remaining stages are asked for, and the deadline is that of
    the next token: the first token plus one TPOT of its stage per token since.
    """
    delivered = len(request.delivered_token_ids)
    candidate = planner_pb2.Candidate(
        request_id=request.request_id,
        attempt=request.attempt,
        application=request.application,
        prompt_tokens=len(request.prompt_token_ids) + delivered,
        ttft_deadline_us=request.ttft_deadline_us,
        stages=request.stages,
        max_tokens=max(1, output_tokens(request) - delivered),
        arrival_us=request.arrival_us,
        verdict_mode=request.verdict_mode,
        delivery_spread_us=request.delivery_spread_us,
    )
    if delivered:
        tracker = _tracker(request)
        del candidate.stages[: tracker.stage_index]
        stage = candidate.stages[0]
        stage.max_tokens = max(1, stage.max_tokens - tracker.stage_output_tokens)
        stage.ttft_ms = 0.0
        candidate.ttft_deadline_us = _next_token_deadline_us(request)
    return candidate


def output_tokens(request: types_pb2.QueuedRequest) -> int:
    """The whole output at most, delivered tokens included."""
    planned = sum(stage.max_tokens for stage in request.stages)
    return min(planned, request.sampling.max_tokens) if request.sampling.max_tokens else planned


def _next_token_deadline_us(request: types_pb2.QueuedRequest) -> int:
    tracker = StageTracker(stages_from_wire(request.stages))
    due_s = 0.0
    for token_id in request.delivered_token_ids:
        tracker.advance((token_id,))
        due_s += tracker.current.tpot_s  # of the stage that the token after this one belongs to
    first_us = request.first_token_us if request.HasField("first_token_us") else request.ttft_deadline_us
    return first_us + round(due_s * 1e6)
