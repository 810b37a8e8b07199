"""A model directory with the shape of a published model and no weights: as fast as the real one with random values."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

from services.cli.stack_spec import BUNDLED_MODEL

__all__ = ["SHAPES", "write_shape"]

_LLAMA: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    "use_cache": True,
}  # fmt: skip

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "llama-3.1-8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 32768,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "smollm2-135m": _LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Configurations by name: 8.0 billion parameters for a GPU, 135 million for a CPU."""


def write_shape(name: str, directory: Path) -> Path:
    """Write the configuration and, so that the services can read and write text, the bundled tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[name], indent=1) + "\n", encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BUNDLED_MODEL / file, directory / file)
    return directory
