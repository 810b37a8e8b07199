"""Another vLLM than the one the hook was written against is refused."""

import pytest

from services.worker.version_guard import SUPPORTED_VLLM, UnsupportedVllmError, check_vllm


def test_the_installed_version_is_supported() -> None:
    assert check_vllm() in SUPPORTED_VLLM


@pytest.mark.parametrize("installed", ["0.32.0", "0.32.0+cpu", "0.32.0+cu130"])
def test_builds_of_a_supported_version_are_supported(installed: str) -> None:
    assert check_vllm(installed) == "0.32.0"


@pytest.mark.parametrize("installed", ["0.31.2", "0.33.0", "0.32.0rc1", "1.0"])
def test_other_versions_are_refused_by_name(installed: str) -> None:
    with pytest.raises(UnsupportedVllmError, match=rf"vLLM {installed} is not supported; supported: 0\.32\.0"):
        check_vllm(installed)
