"""Which sampling parameters are accepted."""

from protos import types_pb2
from services.admission.violations import Violations

__all__ = ["MAX_STOP_CHARS", "MAX_STOP_STRINGS", "check_sampling"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
_MAX_SEED = 2**63 - 1


def check_sampling(sampling: types_pb2.Sampling, vocabulary_size: int, violations: Violations) -> None:
    """Note every sampling parameter out of its range. Unset ones are the engine's defaults."""
    given = {descriptor.name: value for descriptor, value in sampling.ListFields()}
    ranges = {
        "temperature": (0.0, 2.0, False),
        "top_p": (0.0, 1.0, True),
        "top_k": (0, vocabulary_size, False),
        "seed": (0, _MAX_SEED, False),
        "presence_penalty": (-2.0, 2.0, False),
        "frequency_penalty": (-2.0, 2.0, False),
        "repetition_penalty": (0.0, 10.0, True),
    }
    for name in (name for name in ranges if name in given):
        low, high, above_low = ranges[name]
        violations.within(given[name], f"sampling.{name}", low, high, above_low=above_low)
    if sampling.HasField("max_tokens"):
        violations.require(sampling.max_tokens >= 1, "sampling.max_tokens", "must be at least 1")
        violations.require(
            sampling.min_tokens <= sampling.max_tokens,
            "sampling.min_tokens",
            f"{sampling.min_tokens} is more than max_tokens, {sampling.max_tokens}",
        )
    _check_stop(sampling, violations)


def _check_stop(sampling: types_pb2.Sampling, violations: Violations) -> None:
    count = len(sampling.stop)
    violations.require(count <= MAX_STOP_STRINGS, "sampling.stop", f"at most {MAX_STOP_STRINGS} strings, got {count}")
    for index, stop in enumerate(sampling.stop[:MAX_STOP_STRINGS]):
        violations.require(
            0 < len(stop) <= MAX_STOP_CHARS,
            f"sampling.stop[{index}]",
            f"must have 1 to {MAX_STOP_CHARS} characters, got {len(stop)}",
        )
