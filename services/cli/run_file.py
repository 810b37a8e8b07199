"""`{data_dir}/stack.json`: where the services of the running local stack are, so that `slosctl` finds them."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["DataDirInUseError", "RunInfo", "StackLock", "read_run_file", "remove_run_file", "write_run_file"]

_NAME = "stack.json"


class DataDirInUseError(Exception):
    """Another local stack runs in this data directory."""


class RunInfo(BaseModel):
    """Addresses of a running stack. `redis_url` is empty where it holds a password, which is never written down."""

    model_config = ConfigDict(frozen=True)

    pid: int
    admission: tuple[str, ...]
    router: tuple[str, ...]
    planner: tuple[str, ...]
    worker: tuple[str, ...]
    redis_url: str


class StackLock:
    """Holds a data directory for one stack; the kernel releases it however the process ends."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "stack.lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise DataDirInUseError(
                f"another stack runs in {self._path.parent}: stop it, or choose another folder with DATA_DIR="
            ) from None
        self._file = file
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_run_file(data_dir: Path, info: RunInfo) -> None:
    """Publish the addresses; removed again by `remove_run_file`."""
    if urlsplit(info.redis_url).password:
        info = info.model_copy(update={"redis_url": ""})
    (data_dir / _NAME).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")


def remove_run_file(data_dir: Path) -> None:
    """The stack has stopped."""
    (data_dir / _NAME).unlink(missing_ok=True)


def read_run_file(data_dir: Path) -> RunInfo | None:
    """The running stack of this directory; None where none runs."""
    try:
        info = RunInfo.model_validate_json((data_dir / _NAME).read_text(encoding="utf-8"))
        os.kill(info.pid, 0)
    except (FileNotFoundError, ValidationError, ProcessLookupError):
        return None
    except PermissionError:
        pass  # it runs, as another user
    return info
