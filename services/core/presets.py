"""Published coefficients of real GPUs, with KV sizes from real memory sizes; shapes for emulation and planning.

Times are those of DESIGN's sources (Sarathi-style profiles of OPT and Qwen models). KV blocks follow from

    blocks = (gpus * memory_gib * 0.9 - weights_gib - gpus * 4.8) / block_gib,   rounded down to hundreds,

with 2 bytes per weight and per KV element and 4.8 GiB per GPU for activations, CUDA graphs and the allocator: the
figure that reproduces the 7000 blocks measured for OPT-6.7B on one A100-80GB.

The coefficients of `llama-3.1-8b-h200` are our own measurement (`bench/results/gpu-nvidia-h200.json`), rounded and
without its margin.
"""

from dataclasses import dataclass

from services.core.errors import CoreError
from services.core.perf_model import PerfModel, Segment

__all__ = ["PRESETS", "Preset", "UnknownPresetError", "preset"]

_GIB = 1 << 30
_BLOCK_SIZE = 16


class UnknownPresetError(CoreError):
    """No preset has this name."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A served model on named hardware: its performance model and its memory."""

    name: str
    model: PerfModel
    kv_blocks: int
    block_size: int = _BLOCK_SIZE
    max_num_seqs: int = 512
    max_model_len: int = 32768


def _kv_blocks(*, weights_billion: float, layers: int, kv_width: int, gpus: int = 1, memory_gib: float = 80.0) -> int:
    """KV blocks left beside the weights; `kv_width` is KV heads x head size."""
    weights_gib = weights_billion * 2e9 / _GIB
    block_gib = 2 * layers * kv_width * 2 * _BLOCK_SIZE / _GIB
    free_gib = gpus * (memory_gib * 0.9 - 4.8) - weights_gib
    return int(free_gib / block_gib) // 100 * 100


def _model(*segments: Segment, attention: float = 0.0) -> PerfModel:
    return PerfModel(segments, attention=attention)


PRESETS: tuple[Preset, ...] = (
    Preset(
        "opt-6.7b-a100",
        _model(Segment(6.88e-5, b=2.48e-2), Segment(7.52e-5, b=3.0e-3)),
        _kv_blocks(weights_billion=6.7, layers=32, kv_width=4096),
    ),
    Preset(
        "opt-13b-a100",
        _model(Segment(7.21e-5, k_step=3.34e-3, b=3.17e-2)),
        _kv_blocks(weights_billion=13.0, layers=40, kv_width=5120, gpus=2),
    ),
    Preset(
        "opt-30b-a100",
        _model(Segment(9.31e-5, k_step=2.80e-3, b=3.79e-2)),
        _kv_blocks(weights_billion=30.0, layers=48, kv_width=7168, gpus=4),
    ),
    Preset(
        "opt-13b-h100",
        _model(Segment(4.18e-5, b=2.74e-2)),
        _kv_blocks(weights_billion=13.0, layers=40, kv_width=5120),
    ),
    Preset(
        "r1-qwen-7b-a100",
        _model(Segment(6.04e-5, b=1.40e-2), Segment(0.0, b=3.0e-2)),
        _kv_blocks(weights_billion=7.6, layers=28, kv_width=512),
    ),
    Preset(
        "qwen2.5-7b-a100",
        _model(Segment(5.1e-5, k_ctx=8e-8, k_req=1.69e-5, b=1.4e-2)),
        _kv_blocks(weights_billion=7.6, layers=28, kv_width=512),
    ),
    Preset(
        "llama-3.1-8b-h200",
        _model(
            Segment(1.852e-5, k_ctx=3.587e-8, k_req=4.66e-7, b=5.015e-3),
            Segment(2.237e-5, k_req=1.67e-5, b=4.05e-4),
            attention=1.4e-5,
        ),
        _kv_blocks(weights_billion=8.03, layers=32, kv_width=1024, memory_gib=139.8),
        max_num_seqs=1024,
    ),
)


def preset(name: str) -> Preset:
    """The preset of that name; UnknownPresetError lists the known ones."""
    for candidate in PRESETS:
        if candidate.name == name:
            return candidate
    known = ", ".join(sorted(candidate.name for candidate in PRESETS))
    raise UnknownPresetError(f"unknown preset {name!r}; known: {known}")
