"""The process: what it needs to start, and how it stops."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.embedded_redis import EmbeddedRedis
from tests.services.admission.conftest import MODEL, ROOT

START_S = 30.0


async def start(tmp_path: Path, **variables: str) -> asyncio.subprocess.Process:
    environment = {
        **os.environ,
        "SLOS_MODEL": str(MODEL),
        "SLOS_PORT": "0",
        "SLOS_CATALOGUE": str(ROOT / "deploy" / "slos.yaml"),
        "SLOS_DATA_DIR": str(tmp_path),
        **variables,
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.admission",
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def outcome(process: asyncio.subprocess.Process) -> tuple[int, str]:
    _, errors = await asyncio.wait_for(process.communicate(), START_S)
    assert process.returncode is not None
    return process.returncode, errors.decode()


async def test_it_serves_until_it_is_told_to_stop(admission_redis: EmbeddedRedis, tmp_path: Path) -> None:
    process = await start(tmp_path, SLOS_REDIS_URL=admission_redis.url)
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), START_S)).decode()
    assert line.startswith("admission ready on 127.0.0.1:")
    async with grpc.aio.insecure_channel(line.rsplit(" ", 1)[-1].strip()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="slosserve.v1.Admission"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    process.send_signal(signal.SIGTERM)
    status, errors = await outcome(process)
    assert status == 0
    assert "Traceback" not in errors


async def test_without_redis_it_says_which_and_keeps_the_password(tmp_path: Path) -> None:
    status, errors = await outcome(await start(tmp_path, SLOS_REDIS_URL="redis://:secret@127.0.0.1:1/0"))
    assert status == 3
    assert "redis://127.0.0.1:1/0" in errors and "secret" not in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("SLOS_MODEL", "nowhere/at-all", "SLOS_MODEL"),
        ("SLOS_ROUTERS", "nonsense", "SLOS_ROUTERS"),
        ("SLOS_CATALOGUE", "missing.yaml", "SLOS_CATALOGUE"),
    ],
)
async def test_a_bad_setting_stops_the_start_by_name(tmp_path: Path, variable: str, value: str, text: str) -> None:
    variables = {"SLOS_REDIS_URL": "redis://127.0.0.1:1", "HF_HUB_OFFLINE": "1", variable: value}
    status, errors = await outcome(await start(tmp_path, **variables))
    assert status == 2
    assert text in errors and "Traceback" not in errors


async def test_a_stage_that_cannot_end_on_this_model_stops_the_start(tmp_path: Path) -> None:
    catalogue = tmp_path / "slos.yaml"
    catalogue.write_text(
        """
tiers: {loose: 100}
applications:
  odd:
    stages:
      - {kind: THINK, ttft_ms: 500, tpot_ms: 100, end_token: "<no such token>"}
      - {kind: ANSWER, tpot_ms: 100}
"""
    )
    variables = {"SLOS_REDIS_URL": "redis://127.0.0.1:1", "SLOS_CATALOGUE": str(catalogue)}
    status, errors = await outcome(await start(tmp_path, **variables))
    assert status == 2
    assert "applications.odd.stages.0" in errors
