"""The air-gap script, run for real: wheels split into parts, checked, joined and installed without an index."""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "airgapped.sh"


def wheel(folder: Path, name: str, padding: int) -> Path:
    """A real wheel of one module with `padding` incompressible bytes beside it."""
    files = {
        f"{name}/__init__.py": b"ANSWER = 42\n",
        f"{name}/padding.bin": os.urandom(padding),
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()) for path, data in files.items()}
    lines = [f"{path},sha256={digest.rstrip(b'=').decode()},{len(files[path])}" for path, digest in digests.items()]
    record = f"{name}-1.0.dist-info/RECORD"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in {**files, record: "\n".join([*lines, f"{record},,", ""]).encode()}.items():
            archive.writestr(inner, data)
    return path


def run(*arguments: object, part_mib: int = 1) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PART_MIB": str(part_mib), "PYTHON": sys.executable}
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    wheels = tmp_path / "built"
    wheels.mkdir()
    wheel(wheels, "carried_one", 2_500_000)
    wheel(wheels, "carried_two", 1_200_000)
    done = run("split", wheels, tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    return tmp_path / "parts"


def test_parts_are_small_and_install_offline_after_the_trip(parts: Path, tmp_path: Path) -> None:
    pieces = sorted(parts.glob("wheels.tar.part-*"))
    assert len(pieces) >= 4
    assert all(piece.stat().st_size <= 1 << 20 for piece in pieces)
    joined = run("join", parts, tmp_path / "wheels")
    assert joined.returncode == 0, joined.stderr
    venv = tmp_path / "venv"
    installed = run("install", tmp_path / "wheels", venv, "--no-deps", "carried_one", "carried_two")
    assert installed.returncode == 0, installed.stderr
    shown = subprocess.check_output(
        [venv / "bin" / "python", "-c", "import carried_one, carried_two; print(carried_one.ANSWER)"], text=True
    )
    assert shown.strip() == "42"


def test_what_was_not_carried_is_named_and_nothing_is_installed(parts: Path, tmp_path: Path) -> None:
    assert run("join", parts, tmp_path / "wheels").returncode == 0
    refused = run("install", tmp_path / "wheels", tmp_path / "venv", "forgotten-package")
    assert refused.returncode != 0
    assert "forgotten-package" in refused.stderr


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_a_part_that_is_lost_or_damaged_is_named(parts: Path, tmp_path: Path, harm: str) -> None:
    piece = sorted(parts.glob("wheels.tar.part-*"))[1]
    if harm == "lost":
        piece.unlink()
    else:
        piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    joined = run("join", parts, tmp_path / "wheels")
    assert joined.returncode != 0
    assert piece.name in joined.stdout + joined.stderr
    assert not (tmp_path / "wheels").exists()


def test_parts_of_two_archives_never_mix(parts: Path, tmp_path: Path) -> None:
    again = run("split", tmp_path / "built", parts)
    assert again.returncode != 0
    assert "not empty" in again.stderr
