"""Fitted profiles on disk, one file per model, hardware, vLLM version and whatever else changes batch times.

A profile keeps the batches it was fitted to, so that people can see what the fit leaves out (`slosctl perf`).
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from services.core.fit import FitResult, Sample
from services.core.perf_model import BatchShape, PerfModel, Segment

__all__ = [
    "ProfileKey",
    "ProfiledBatch",
    "ReplicaProfile",
    "load_profile",
    "model_fingerprint",
    "processor_name",
    "profile_of",
    "save_profile",
]

_FORMAT = 3
_MOST_BATCHES = 1000


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """Everything that batch times depend on."""

    model: str
    hardware: str
    vllm: str
    dtype: str
    threads: int
    block_size: int
    max_batch_tokens: int
    draft_steps: int = 0  # the most drafts that the engine verifies per step
    extra: str = ""  # further engine arguments, as JSON
    async_scheduling: bool = False

    def path(self, data_dir: Path) -> Path:
        """Where this profile lives."""
        digest = blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()
        return data_dir / "profiles" / f"{digest}.json"


@dataclass(frozen=True, slots=True)
class ProfiledBatch:
    """A batch that was measured; `heldout`: it took no part in the fit and only judged it."""

    sample: Sample
    heldout: bool


@dataclass(frozen=True, slots=True)
class ReplicaProfile:
    """A fitted model, its R2 on batches that did not take part in the fit, and the batches, by the time they took.

    `samples` counts the batches there were; of very many, `batches` keeps an even choice.
    """

    model: PerfModel
    r2_heldout: float
    samples: int = 0
    batches: tuple[ProfiledBatch, ...] = ()
    cached: bool = False


def profile_of(result: FitResult, samples: Sequence[Sample]) -> ReplicaProfile:
    """The profile of a fit over `samples`."""
    batches = [ProfiledBatch(sample, index in result.heldout) for index, sample in enumerate(samples)]
    batches.sort(key=lambda batch: (batch.heldout, batch.sample.seconds))  # thinned in either group alike
    stride = -(-len(batches) // _MOST_BATCHES)
    kept = sorted(batches[::stride], key=lambda batch: batch.sample.seconds)
    return ReplicaProfile(result.model, result.r2_heldout, result.samples, tuple(kept))


def load_profile(key: ProfileKey, data_dir: Path) -> ReplicaProfile | None:
    """The profile kept for `key`; None if there is none that can be read."""
    path = key.path(data_dir)
    if not path.is_file():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT or stored["key"] != asdict(key):
            return None
        segments = tuple(Segment(**segment) for segment in stored["segments"])
        model = PerfModel(segments, stored["margin_s"], stored["r2_heldout"], stored["attention"])
        batches = tuple(_batch(*row) for row in stored["batches"])
        return ReplicaProfile(model, stored["r2_heldout"], stored["samples"], batches, cached=True)
    except (KeyError, TypeError, ValueError):
        return None  # written by another version or cut short: measuring again costs seconds


def save_profile(key: ProfileKey, profile: ReplicaProfile, data_dir: Path) -> Path:
    """Keep a profile; the file appears complete or not at all."""
    path = key.path(data_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "format": _FORMAT,
        "key": asdict(key),
        "segments": [asdict(segment) for segment in profile.model.segments],
        "margin_s": profile.model.margin_s,
        "attention": profile.model.attention,
        "r2_heldout": profile.r2_heldout,
        "samples": profile.samples,
        "batch_columns": ["tokens", "context_tokens", "requests", "draft_steps", "attended", "seconds", "heldout"],
        "batches": [[*astuple(b.sample.shape), b.sample.seconds, b.heldout] for b in profile.batches],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(stored) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _batch(
    tokens: int,
    context_tokens: int,
    requests: int,
    draft_steps: int,
    attended: float,
    seconds: float,
    heldout: bool,
) -> ProfiledBatch:
    return ProfiledBatch(Sample(BatchShape(tokens, context_tokens, requests, draft_steps, attended), seconds), heldout)


def model_fingerprint(model: str) -> str:
    """Name of a hub model, or a directory with a digest of its configuration."""
    config = Path(model) / "config.json"
    if not config.is_file():
        return model
    return f"{Path(model).name}:{blake2b(config.read_bytes(), digest_size=8).hexdigest()}"


def processor_name() -> str:
    """The CPU's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
