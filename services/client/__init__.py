"""The typed Python client: `SlosClient` and the values it gives back."""

from services.client.answers import Explanation, HopReport, Quote, rejected_verdict
from services.client.client import Completion, GenerateOptions, SlosClient
from services.client.events import (
    Constraint,
    Event,
    Finished,
    StageEnd,
    StageReport,
    Tokens,
    Verdict,
    VerdictChanged,
    verdict_from_wire,
)
from services.client.requests import OnInfeasible, Prompt, Stage, request_to_wire
from services.common.errors import FieldViolation, InvalidRequestError, Reason, SloServeError

__all__ = [
    "Completion",
    "Constraint",
    "Event",
    "Explanation",
    "FieldViolation",
    "Finished",
    "GenerateOptions",
    "HopReport",
    "InvalidRequestError",
    "OnInfeasible",
    "Prompt",
    "Quote",
    "Reason",
    "SloServeError",
    "SlosClient",
    "Stage",
    "StageEnd",
    "StageReport",
    "Tokens",
    "Verdict",
    "VerdictChanged",
    "rejected_verdict",
    "request_to_wire",
    "verdict_from_wire",
]
