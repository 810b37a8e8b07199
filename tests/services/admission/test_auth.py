"""Keys and tenants."""

import pytest

from services.admission.auth import authenticate
from services.common.config import Application, Catalogue, StageTemplate, Tenant
from services.common.errors import Reason, SloServeError

STAGE = StageTemplate(ttft_ms=500, tpot_ms=100)
OPEN = Catalogue(tiers={"loose": 100}, applications={"chatbot": Application(stages=(STAGE,))})
KEYED = OPEN.model_copy(update={"tenants": {"gold": Tenant(key="gold-key-1"), "free": Tenant(key="free-key-1")}})


def test_without_keys_everybody_is_the_default_tenant() -> None:
    assert authenticate((), OPEN).tenant == "default"


@pytest.mark.parametrize("value", ["Bearer gold-key-1", "bearer  gold-key-1", b"Bearer gold-key-1"])
def test_a_key_names_its_tenant(value: str | bytes) -> None:
    assert authenticate((("x", "y"), ("authorization", value)), KEYED).tenant == "gold"


@pytest.mark.parametrize("value", [None, "Bearer nope-nope", "Basic gold-key-1", "gold-key-1", "Bearer "])
def test_a_missing_or_unknown_key_is_refused(value: str | None) -> None:
    with pytest.raises(SloServeError) as refused:
        authenticate((("authorization", value),) if value else (), KEYED)
    assert refused.value.reason is Reason.KEY_UNKNOWN
    assert "gold" not in refused.value.text
