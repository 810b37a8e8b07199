"""What is wrong in the catalogue stops every service at its start, by the path inside the file."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from services.cli.stack_layout import ROLES

ROOT = Path(__file__).parents[2]
START_S = 60.0

UNKNOWN_FIELDS = """
tiers: {tight: 50, loose: 100}
ttft_flor_ms: 100
applications:
  chatbot:
    stages:
      - {ttft_slowdown: 5, tpot_ms: 100, tpot_msec: 90}
    on_infesible: reject
tenants:
  default: {min_tpot: 20}
"""


@pytest.mark.parametrize("role", ROLES)
async def test_unknown_fields_stop_every_service_and_are_all_named(role: str, tmp_path: Path) -> None:
    catalogue = tmp_path / "slos.yaml"
    catalogue.write_text(UNKNOWN_FIELDS, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLOS_", "OTEL_"))}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{role}"),
        cwd=ROOT,
        env={
            **kept,
            "SLOS_PORT": "0",
            "SLOS_REDIS_URL": "redis://127.0.0.1:1/0",  # nobody is there: the catalogue is read first
            "SLOS_MODEL": str(ROOT / "models" / "tiny"),
            "SLOS_CATALOGUE": str(catalogue),
            "SLOS_DATA_DIR": str(tmp_path),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, raw_errors = await asyncio.wait_for(process.communicate(), START_S)
    errors = raw_errors.decode()
    assert process.returncode == 2, errors
    assert b"ready" not in out
    for path in (
        "ttft_flor_ms",
        "applications.chatbot.stages.0.tpot_msec",
        "applications.chatbot.on_infesible",
        "tenants.default.min_tpot",
    ):
        assert path in errors
    assert "Traceback" not in errors
