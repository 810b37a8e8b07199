"""Who is calling, and how tight an SLO they may ask for."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.common.config import Catalogue, Tenant
from services.common.errors import Reason, SloServeError
from services.core.slo import StageSlo

__all__ = ["Caller", "authenticate", "check_permitted"]

_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated tenant."""

    tenant: str
    limits: Tenant


def _bearer_key(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for name, value in metadata:
        if name == "authorization":
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            scheme, _, key = text.partition(" ")
            return key.strip() if scheme.lower() == "bearer" else None
    return None


def authenticate(metadata: Iterable[tuple[str, str | bytes]], catalogue: Catalogue) -> Caller:
    """The tenant of a call by its `authorization: Bearer KEY`.

    Where no tenant has a key, every caller is the tenant `default`. Otherwise a missing or unknown key is
    UNAUTHENTICATED.
    """
    if not catalogue.needs_key:
        return Caller(_DEFAULT, catalogue.tenants.get(_DEFAULT, Tenant()))
    key = _bearer_key(metadata)
    if key is None:
        raise SloServeError(Reason.KEY_UNKNOWN, "send your key as metadata `authorization: Bearer KEY`")
    for name, tenant in catalogue.tenants.items():
        if tenant.key is not None and hmac.compare_digest(tenant.key.encode(), key.encode()):
            return Caller(name, tenant)
    raise SloServeError(Reason.KEY_UNKNOWN, "this key belongs to no tenant")


def check_permitted(caller: Caller, stages: Sequence[StageSlo]) -> None:
    """PERMISSION_DENIED where a resolved stage is tighter than the tenant may ask for."""
    limits = caller.limits
    for index, stage in enumerate(stages):
        if stage.tpot_s * 1000 < limits.min_tpot_ms:
            raise SloServeError(
                Reason.SLO_NOT_PERMITTED,
                f"stages[{index}].tpot_ms: {stage.tpot_s * 1000:g} ms is tighter than the {limits.min_tpot_ms:g} ms "
                f"tenant {caller.tenant!r} may ask for",
            )
        if stage.ttft_s is not None and stage.ttft_s * 1000 < limits.min_ttft_ms:
            raise SloServeError(
                Reason.SLO_NOT_PERMITTED,
                f"stages[{index}].ttft: {stage.ttft_s * 1000:g} ms is tighter than the {limits.min_ttft_ms:g} ms "
                f"tenant {caller.tenant!r} may ask for",
            )
