"""Bad settings stop the start and name the variable."""

import pytest

from services.admission.settings import AdmissionSettings
from services.common.config import ConfigError, load_settings


@pytest.fixture(autouse=True)
def needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("SLOS_MODEL", "models/tiny")


def test_routers_are_a_list_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_ROUTERS", "a:1, b-2.example:50052,[::1]:7")
    assert load_settings(AdmissionSettings).routers == ("a:1", "b-2.example:50052", "[::1]:7")


def test_two_processes_have_two_ids() -> None:
    assert load_settings(AdmissionSettings).admission_id != load_settings(AdmissionSettings).admission_id


@pytest.mark.parametrize(
    ("name", "value"),
    [("SLOS_ROUTERS", ""), ("SLOS_ROUTERS", "nowhere"), ("SLOS_PORT", "70000"), ("SLOS_ADMISSION_ID", "has spaces")],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name.removeprefix("SLOS_")):
        load_settings(AdmissionSettings)


def test_the_model_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLOS_MODEL")
    with pytest.raises(ConfigError, match="SLOS_MODEL"):
        load_settings(AdmissionSettings)
