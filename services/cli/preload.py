"""The two libraries vLLM recommends to preload for CPU inference, where this machine has them.

tcmalloc makes allocation cheaper and Intel's OpenMP, which vLLM's CPU build installs into the environment, replaces the
GNU one. vLLM reads `LD_PRELOAD` to see that they are there.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["preload_environment"]

_TCMALLOC_FOLDERS = tuple(
    Path(folder) for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
)
_TCMALLOC_NAMES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


def _openmp(prefix: Path) -> Path | None:
    path = prefix / "lib" / "libiomp5.so"
    return path if path.exists() else None


def _tcmalloc(folders: tuple[Path, ...]) -> Path | None:
    return next((folder / name for folder in folders for name in _TCMALLOC_NAMES if (folder / name).exists()), None)


def preload_environment(
    environment: Mapping[str, str],
    *,
    prefix: Path = Path(sys.prefix),
    tcmalloc_folders: tuple[Path, ...] = _TCMALLOC_FOLDERS,
) -> dict[str, str]:
    """`LD_PRELOAD` for a worker that runs vLLM on the CPU, keeping what it already holds; empty on other systems."""
    if sys.platform != "linux":
        return {}
    present = [part for part in environment.get("LD_PRELOAD", "").replace(" ", ":").split(":") if part]
    gnu_openmp = any(Path(part).name.startswith("libgomp") for part in present)  # vLLM refuses to start with both
    for library in (_tcmalloc(tcmalloc_folders), None if gnu_openmp else _openmp(prefix)):
        if library is not None and not any(Path(part).name == library.name for part in present):
            present.append(str(library))
    return {"LD_PRELOAD": ":".join(present)} if present else {}
