"""What a planner process is told."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from services.common.config import ServiceSettings
from services.core.admission import Policy
from services.core.verdict import EARLY_PROMPT_TOKENS
from services.core.view import EARLY_SPEND

__all__ = ["PlannerSettings"]


class PlannerSettings(ServiceSettings):
    """Environment variables `SLOS_*` of the planner.

    early_prompt_tokens: prompts up to this long are promised on arrival under early verdicts.
    early_spend: in a conflict, promised decodes may be late by this share of their remaining TPOT budget and catch up.
    reservation_s: how long an unconfirmed promise holds its place.
    attainment_floor: an application whose attainment is below this counts ten times as heavy; 0 switches it off.
    forget_s: how long the ledger of a replica whose stream broke is kept for its return.
    """

    redis_url: str = ""  # the planner keeps nothing in Redis: workers fill it again after a restart
    port: Annotated[int, Field(ge=0, le=65535)] = 50053
    policy: Policy = Policy.MH
    attainment_floor: Annotated[float, Field(ge=0, lt=1)] = 0.85
    early_prompt_tokens: Annotated[int, Field(ge=0)] = EARLY_PROMPT_TOKENS
    early_spend: Annotated[float, Field(ge=0, lt=1)] = EARLY_SPEND
    reservation_s: Annotated[float, Field(gt=0, le=60)] = 2.0
    forget_s: Annotated[float, Field(ge=0, le=600)] = 5.0
    decision_log: Path | None = None
    decision_log_mb: Annotated[int, Field(ge=1, le=65536)] = 64
