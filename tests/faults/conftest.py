"""One stack for the fault tests: three emulated replicas, two admissions, two routers, a planner, Redis."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from bench.fault_load import FaultLoad, Shape
from bench.task_watch import TaskWatch
from services.cli.stack_layout import process_names
from services.cli.stack_spec import StackSpec
from tests.faults.waiting import WatchedStack, nothing_left


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WatchedStack]:
    spec = StackSpec(
        data_dir=tmp_path_factory.mktemp("faults"),
        engine="emulated",
        preset="opt-6.7b-a100",
        num_workers=3,
        num_admissions=2,
        num_routers=2,
        drain_grace_s=20,
    )
    async with TaskWatch(process_names(spec)) as tasks, WatchedStack(spec, tasks) as stack:
        await FaultLoad(stack.addresses.admission, Shape(rate_rps=5.0), name="warm").run(3.0)
        await nothing_left(stack, watched=False)
        await tasks.learn_idle()
        yield stack
