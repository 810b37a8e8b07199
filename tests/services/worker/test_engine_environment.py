"""What an engine process inherits in its environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.worker.engine_environment import prepare_environment
from services.worker.engine_settings import EngineSettings
from services.worker.vllm_engine import VllmEngine

MODEL = str(Path(__file__).parents[3] / "models" / "tiny")
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "TCMALLOC_RELEASE_RATE"}


class Launched(Exception):  # noqa: N818 - no error: the test has seen what it wanted
    pass


class Platform:
    def __init__(self, *, cpu: bool) -> None:
        self._cpu = cpu

    def is_cpu(self) -> bool:
        return self._cpu


async def set_for(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The allocator's variables as they are when the engine process starts."""

    async def launch(*_: object) -> None:
        raise Launched

    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in ALLOCATOR})
    monkeypatch.setattr(VllmEngine, "_launch", launch)
    engine = VllmEngine(settings)
    with pytest.raises(Launched):
        await engine.start()
    await engine.stop()
    return ALLOCATOR & os.environ.keys()


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "gpu"])
async def test_only_an_engine_on_the_cpu_keeps_what_it_freed(
    cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", Platform(cpu=cpu))
    found = await set_for(EngineSettings(engine="vllm", model=MODEL, data_dir=tmp_path), monkeypatch)
    assert found == (ALLOCATOR if cpu else set())


async def test_an_emulated_engine_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await set_for(EngineSettings(engine="emulated", model=MODEL, data_dir=tmp_path), monkeypatch)


def test_drafting_does_not_change_the_number_of_threads_that_the_model_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_environment(EngineSettings(engine="vllm", model=MODEL, data_dir=tmp_path, cpu_threads=1))
    drafting = (
        "import numpy, torch\n"
        "from vllm.v1.spec_decode.ngram_proposer import batch_propose_numba\n"
        "before = torch.get_num_threads()\n"
        "lengths, tokens = numpy.full(1, 30, numpy.int32), numpy.zeros((1, 64), numpy.int32)\n"
        "drafts, numbers = numpy.zeros((1, 5), numpy.int32), numpy.zeros(1, numpy.int32)\n"
        "batch_propose_numba([0], lengths, tokens, 2, 5, 64, 5, drafts, numbers)\n"
        "print(before, torch.get_num_threads(), numbers[0])"
    )
    ran = subprocess.run([sys.executable, "-c", drafting], env=os.environ, capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-3:] == ["1", "1", "5"]
