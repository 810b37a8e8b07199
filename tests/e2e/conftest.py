"""Stacks the end-to-end tests talk to: all services as processes, real Redis, both engines.

The stacks are shared by a session. `emulated` runs two workers on emulated GPUs and sends its traces to an in-process
OTLP collector; `cpu_vllm` runs real vLLM with the bundled model. Tests that stop or kill something start their own.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec
from tests.e2e.otlp_sink import OtlpSink

PRESET = "opt-6.7b-a100"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def otlp_sink() -> AsyncIterator[OtlpSink]:
    async with OtlpSink() as sink:
        yield sink


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def emulated(tmp_path_factory: pytest.TempPathFactory, otlp_sink: OtlpSink) -> AsyncIterator[LocalStack]:
    spec = StackSpec(
        data_dir=tmp_path_factory.mktemp("emulated"),
        engine="emulated",
        preset=PRESET,
        num_workers=2,
        environment={
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.endpoint,
            "OTEL_EXPORTER_OTLP_INSECURE": "true",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        },
    )
    async with LocalStack(spec) as stack:
        yield stack


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cpu_vllm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    # SLOs for a CPU: the stock catalogue's times belong to GPUs
    spec = StackSpec(
        data_dir=tmp_path_factory.mktemp("vllm"),
        engine="vllm",
        num_workers=1,
        catalogue=Path(__file__).parent / "cpu-slos.yaml",
        service_environment={"worker": {"SLOS_DTYPE": "float32"}},
    )
    async with LocalStack(spec) as stack:
        yield stack
