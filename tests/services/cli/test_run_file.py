import os
from pathlib import Path

import pytest

from services.cli.run_file import (
    DataDirInUseError,
    RunInfo,
    StackLock,
    read_run_file,
    remove_run_file,
    write_run_file,
)
from services.cli.target import find_target


def info(**changes: object) -> RunInfo:
    values: dict[str, object] = {
        "pid": os.getpid(),
        "admission": ("127.0.0.1:1",),
        "router": ("127.0.0.1:2",),
        "planner": ("127.0.0.1:3",),
        "worker": ("127.0.0.1:4",),
        "redis_url": "redis://127.0.0.1:5/0",
    }
    return RunInfo.model_validate(values | changes)


def test_a_running_stack_is_found_until_it_is_removed(tmp_path: Path) -> None:
    write_run_file(tmp_path, info())
    assert read_run_file(tmp_path) == info()
    remove_run_file(tmp_path)
    assert read_run_file(tmp_path) is None


def test_a_stack_whose_process_is_gone_is_not_found(tmp_path: Path) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    write_run_file(tmp_path, info(pid=child))
    assert read_run_file(tmp_path) is None


def test_a_password_is_never_written_down(tmp_path: Path) -> None:
    write_run_file(tmp_path, info(redis_url="rediss://:secret@host:6380/0"))
    assert "secret" not in (tmp_path / "stack.json").read_text()


def test_a_second_stack_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with StackLock(tmp_path), pytest.raises(DataDirInUseError, match="DATA_DIR"), StackLock(tmp_path):
        pass
    with StackLock(tmp_path):
        pass


def test_explicit_addresses_beat_the_running_stack_and_it_beats_the_defaults(tmp_path: Path) -> None:
    assert find_target(tmp_path).router == "127.0.0.1:50052"
    write_run_file(tmp_path, info())
    assert find_target(tmp_path).router == "127.0.0.1:2"
    assert find_target(tmp_path, router="host:9").router == "host:9"
