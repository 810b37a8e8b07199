import sys
from pathlib import Path

import pytest

from services.cli.preload import preload_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is a Linux matter")


def test_libraries_that_are_present_are_preloaded(tmp_path: Path) -> None:
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    tcmalloc = tmp_path / "libtcmalloc_minimal.so.4"
    tcmalloc.touch()
    assert preload_environment({}, prefix=tmp_path, tcmalloc_folders=(tmp_path,)) == {
        "LD_PRELOAD": f"{tcmalloc}:{openmp}"
    }


def test_what_is_preloaded_already_stays_and_is_not_doubled(tmp_path: Path) -> None:
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    environment = {"LD_PRELOAD": "/other/libiomp5.so /opt/audit.so"}
    assert preload_environment(environment, prefix=tmp_path, tcmalloc_folders=()) == {
        "LD_PRELOAD": "/other/libiomp5.so:/opt/audit.so"
    }


def test_nothing_is_set_where_neither_library_exists(tmp_path: Path) -> None:
    assert preload_environment({}, prefix=tmp_path, tcmalloc_folders=(tmp_path,)) == {}


def test_intel_openmp_stays_away_from_the_gnu_one(tmp_path: Path) -> None:
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    environment = {"LD_PRELOAD": "/usr/lib/libgomp-1234.so.1"}
    assert preload_environment(environment, prefix=tmp_path, tcmalloc_folders=()) == environment
