"""The environment of one replica's actor: the fleet's own variables, and what makes the replica this one."""

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["replica_environment"]

_PASSED_ON = ("SLOS_", "OTEL_", "VLLM_", "HF_", "CUDA_")
_ALSO = ("PYTHONPATH", "LD_PRELOAD", "PATH", "HOME", "TMPDIR")
_PATHS = ("SLOS_CATALOGUE", "SLOS_DATA_DIR", "SLOS_MODEL")
_DEFAULT_CATALOGUE = "deploy/slos.yaml"


def replica_environment(replica_id: str, host: str, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of the replica's process. `host` is where it listens and is reached, on a free port.

    Paths that exist here are made absolute: an actor does not run in the directory the fleet was started in.
    """
    passed = {name: value for name, value in base.items() if name.startswith(_PASSED_ON) or name in _ALSO}
    passed.setdefault("SLOS_CATALOGUE", _DEFAULT_CATALOGUE)
    for name in _PATHS:
        if name in passed and Path(passed[name]).exists():
            passed[name] = str(Path(passed[name]).resolve())
    return passed | {
        "SLOS_REPLICA_ID": replica_id,
        "SLOS_HOST": host,
        "SLOS_PORT": "0",
        "SLOS_ADVERTISE": "",
        "PYTHONUNBUFFERED": "1",
    }
