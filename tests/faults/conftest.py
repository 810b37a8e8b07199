"""One stack for the fault tests: three emulated replicas, two admissions, two routers, a planner, Redis."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.cli.stack import LocalStack
from services.cli.stack_spec import StackSpec


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalStack]:
    spec = StackSpec(
        data_dir=tmp_path_factory.mktemp("faults"),
        engine="emulated",
        preset="opt-6.7b-a100",
        num_workers=3,
        num_admissions=2,
        num_routers=2,
        drain_grace_s=20,
    )
    async with LocalStack(spec) as stack:
        yield stack
