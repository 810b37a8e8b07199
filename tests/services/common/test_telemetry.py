"""Where spans go, by the environment."""

import pytest

from services.common.telemetry import traces_endpoint


@pytest.mark.parametrize(
    ("common", "of_traces", "endpoint"),
    [
        (None, None, None),
        ("", None, None),  # what a Compose file sets that was told to leave it empty
        ("", "", None),
        ("http://all:4317", None, "http://all:4317"),
        ("http://all:4317", "", "http://all:4317"),
        ("http://all:4317", "http://traces:4317", "http://traces:4317"),
    ],
)
def test_an_empty_endpoint_is_none(
    monkeypatch: pytest.MonkeyPatch, common: str | None, of_traces: str | None, endpoint: str | None
) -> None:
    for variable, value in (("ENDPOINT", common), ("TRACES_ENDPOINT", of_traces)):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{variable}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{variable}", value)
    assert traces_endpoint() == endpoint
