"""What a PlaceRequest must say before anybody is asked about it."""

import math
from collections.abc import Collection

from protos import router_pb2, types_pb2
from services.common.errors import FieldViolation, InvalidRequestError

__all__ = ["check_explain", "check_place", "check_quote", "check_replace"]

_MAX_ID = 256


def check_place(place: router_pb2.PlaceRequest, tiers: Collection[str]) -> None:
    """Raise InvalidRequestError naming every bad field. `tiers` are the configured names."""
    bad = _request_violations(place.request, tiers)
    if place.on_infeasible not in types_pb2.OnInfeasible.values():
        bad.append(FieldViolation("on_infeasible", f"{place.on_infeasible} is not known"))
    if bad:
        raise InvalidRequestError(*bad)


def check_quote(quote: router_pb2.RouterQuoteRequest, tiers: Collection[str]) -> None:
    """Raise InvalidRequestError naming every bad field: a quote is about what could be placed as it stands."""
    bad = _request_violations(quote.request, tiers)
    if bad:
        raise InvalidRequestError(*bad)


def _request_violations(request: types_pb2.QueuedRequest, tiers: Collection[str]) -> list[FieldViolation]:
    checks = [
        ("request_id", 0 < len(request.request_id) <= _MAX_ID, f"must have 1 to {_MAX_ID} characters"),
        ("attempt", request.attempt == 1, "is 1 for a first placement; Replace makes the later ones"),
        ("admission_id", bool(request.admission_id), "must name the admission process that serves the client"),
        ("prompt_token_ids", len(request.prompt_token_ids) > 0, "must not be empty"),
        ("arrival_us", request.arrival_us > 0, "must be set"),
        ("ttft_deadline_us", request.ttft_deadline_us > request.arrival_us, "must lie after the arrival"),
        ("client_deadline_us", request.client_deadline_us >= 0, "must not be negative"),
        ("stages", len(request.stages) > 0, "must not be empty"),
    ]
    bad = [FieldViolation(f"request.{name}", text) for name, fine, text in checks if not fine]
    for index, stage in enumerate(request.stages):
        bad += _stage_violations(f"request.stages[{index}]", stage, tiers)
    return bad


def _stage_violations(field: str, stage: types_pb2.Stage, tiers: Collection[str]) -> list[FieldViolation]:
    checks = [
        ("tier", stage.tier in tiers, f"{stage.tier!r} is not configured (known: {', '.join(tiers)})"),
        ("tpot_ms", math.isfinite(stage.tpot_ms) and stage.tpot_ms > 0, "must be a positive number of milliseconds"),
        ("ttft_ms", math.isfinite(stage.ttft_ms) and stage.ttft_ms >= 0, "must not be negative"),
        ("max_tokens", stage.max_tokens > 0, "must be resolved to at least 1"),
    ]
    return [FieldViolation(f"{field}.{name}", text) for name, fine, text in checks if not fine]


def check_replace(replace: router_pb2.ReplaceRequest) -> None:
    """Raise InvalidRequestError naming every bad field."""
    checks = [
        ("request_id", 0 < len(replace.request_id) <= _MAX_ID, f"must have 1 to {_MAX_ID} characters"),
        ("attempt", replace.attempt >= 1, "must name the attempt that failed"),
    ]
    bad = [FieldViolation(name, text) for name, fine, text in checks if not fine]
    if bad:
        raise InvalidRequestError(*bad)


def check_explain(explain: router_pb2.RouterExplainRequest) -> None:
    """Raise InvalidRequestError where no request is named."""
    if not 0 < len(explain.request_id) <= _MAX_ID:
        raise InvalidRequestError(FieldViolation("request_id", f"must have 1 to {_MAX_ID} characters"))
