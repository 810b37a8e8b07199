"""Where a command finds the system: the command line, the environment, or the stack of the data directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from services.cli.run_file import RunInfo, read_run_file

__all__ = ["AdmissionOption", "DataDirOption", "KeyOption", "RedisOption", "RouterOption", "Target", "find_target"]

DataDirOption = Annotated[
    Path, typer.Option("--data-dir", envvar="SLOS_DATA_DIR", help="Data directory of the local stack.")
]
AdmissionOption = Annotated[
    str, typer.Option("--admission", envvar="SLOS_ADMISSION", help="host:port; default: the local stack's.")
]
RouterOption = Annotated[
    str, typer.Option("--router", envvar="SLOS_ROUTER", help="host:port; default: the local stack's.")
]
RedisOption = Annotated[
    str, typer.Option("--redis-url", envvar="SLOS_REDIS_URL", help="Default: the local stack's.", show_envvar=True)
]
KeyOption = Annotated[str, typer.Option("--key", envvar="SLOS_KEY", help="API key of the tenant.")]

_DEFAULT_ADMISSION = "127.0.0.1:50051"
_DEFAULT_ROUTER = "127.0.0.1:50052"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the parts of the system are."""

    admission: str
    router: str
    redis_url: str
    data_dir: Path


def find_target(data_dir: Path, *, admission: str = "", router: str = "", redis_url: str = "") -> Target:
    """Explicit values win, then the running local stack of `data_dir`, then the default ports.

    `redis_url` stays empty where nothing names it; the commands that need it say so.
    """
    info: RunInfo | None = read_run_file(data_dir)
    return Target(
        admission=admission or (info.admission[0] if info and info.admission else _DEFAULT_ADMISSION),
        router=router or (info.router[0] if info and info.router else _DEFAULT_ROUTER),
        redis_url=redis_url or (info.redis_url if info else ""),
        data_dir=data_dir,
    )
