"""The kernel cache notices a change in any kernel."""

import shutil
import subprocess
import sys
from pathlib import Path

import services.core
from services.core import compiled, simulate


def test_a_change_in_any_kernel_changes_the_digest(tmp_path: Path, monkeypatch) -> None:
    for source in Path(compiled.__file__).parent.glob("*.py"):
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    before = compiled.kernel_digest()
    (tmp_path / "placement.py").write_text("# not a kernel\n")
    assert compiled.kernel_digest() == before
    with (tmp_path / "roofline.py").open("a") as kernel:
        kernel.write("# another arithmetic\n")
    assert compiled.kernel_digest() != before


def test_cached_kernels_carry_the_digest() -> None:
    stamp = simulate.simulate._cache._cache_file._source_stamp
    assert stamp == compiled.kernel_digest()


def test_importing_a_deadline_does_not_import_a_compiler() -> None:
    root = Path(services.core.__path__[0]).parent.parent
    code = (
        "import sys; import services.core.slo, services.core.stages, services.core.presets, services.core.placement, "
        "services.core.best_effort, services.core.lengths; sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
