import asyncio
import os
import sys
from pathlib import Path

import pytest

from services.cli.ports import find_free_ports
from services.cli.service_process import ProcessSpec, ServiceFailedError, ServiceProcess

_HERE = Path(__file__).parent
_TIMEOUT_S = 30.0


def make(tmp_path: Path, **environment: str) -> ServiceProcess:
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    path = os.pathsep.join((str(_HERE), *filter(None, sys.path)))
    spec = ProcessSpec(
        name="thing-0",
        module="healthy_service",
        address=address,
        environment={**os.environ, "PYTHONPATH": path, "ADDRESS": address, **environment},
        log_path=tmp_path / "logs" / "thing-0.log",
    )
    return ServiceProcess(spec)


async def test_a_healthy_service_is_awaited_and_drains_on_stop(tmp_path: Path) -> None:
    process = make(tmp_path)
    await process.start()
    await process.wait_healthy(_TIMEOUT_S)
    assert process.running
    assert await process.stop(grace_s=_TIMEOUT_S) == 0
    assert not process.running


async def test_a_service_that_ends_at_start_fails_with_the_tail_of_its_log(tmp_path: Path) -> None:
    process = make(tmp_path, FAIL_AT_START="1")
    await process.start()
    with pytest.raises(ServiceFailedError, match=r"(?s)thing-0 ended with exit status 2.*no configuration for me"):
        await process.wait_healthy(_TIMEOUT_S)


async def test_a_service_that_never_serves_fails_after_the_timeout(tmp_path: Path) -> None:
    process = make(tmp_path, NEVER_SERVING="1")
    await process.start()
    try:
        with pytest.raises(ServiceFailedError, match="not healthy after"):
            await process.wait_healthy(3.0)
    finally:
        await process.kill()


async def test_a_service_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    process = make(tmp_path, IGNORE_SIGTERM="1")
    await process.start()
    await process.wait_healthy(_TIMEOUT_S)
    assert await process.stop(grace_s=0.2) == -9


async def test_a_killed_service_starts_again_at_the_same_address(tmp_path: Path) -> None:
    process = make(tmp_path)
    await process.start()
    await process.wait_healthy(_TIMEOUT_S)
    first = process.pid
    await process.kill()
    assert not process.running
    await process.start()
    await process.wait_healthy(_TIMEOUT_S)
    assert process.pid != first
    await process.stop(grace_s=_TIMEOUT_S)


async def test_stopping_what_was_never_started_does_nothing(tmp_path: Path) -> None:
    assert await make(tmp_path).stop(grace_s=1.0) is None


async def test_a_new_stack_keeps_the_log_of_the_one_before(tmp_path: Path) -> None:
    process = make(tmp_path, FAIL_AT_START="1")
    process.spec.log_path.parent.mkdir()
    process.spec.log_path.write_text("of the stack before\n")
    await process.start()
    await process.wait_ended()
    assert "of the stack before" not in process.log_tail()
    assert process.spec.log_path.with_suffix(".log.1").read_text() == "of the stack before\n"


@pytest.mark.parametrize("package", ["services", "bench"])
async def test_grpc_is_told_to_leave_forks_alone_before_it_is_imported(package: str) -> None:
    """With its fork handlers, one start of a service in twenty beside running gRPC ended before it had begun."""
    code = f"import {package}, os, sys; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'], 'grpc' in sys.modules)"
    kept = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), env=kept, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out.decode().split() == ["0", "False"]
