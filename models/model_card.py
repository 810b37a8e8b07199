"""The model card: what the model is, how it was made, and the checksums of its files."""

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import transformers

__all__ = ["Training", "write_model_card"]

TEMPLATE: Final = """\
# tiny

A Llama-shaped language model with {parameters:,} parameters, made for this project so that it can start, be tested
and be shown on any machine without downloading anything.

**It knows nothing.** It has seen only the docstrings of Python's standard library and writes text that looks like
them: grammatical in places, wrong in substance. Do not use it for answers. It is here because a real model, however
small, runs through every real part of a serving system.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: 4 layers, hidden 256, MLP 704, 4 heads of 64, 2 KV heads, tied embeddings |
| weights | bfloat16, `model.safetensors` |
| context | 8192 positions; trained on windows of 512 and 2048 tokens, so text beyond 2048 degrades |
| tokenizer | byte-level BPE, 4096 tokens |
| control tokens | `<|bos|>` 0, `<|end|>` 1 (turn end), `<|pad|>` 2, `<|system|>` 3, `<|user|>` 4, `<|assistant|>` 5 |
| stage tokens | `<think>` 6, `</think>` 7, `<tool_call>` 8, `</tool_call>` 9; kept in decoded text |

## How to prompt it

`tokenizer_config.json` has the chat template. Written out, with `<|bos|>` added by the tokenizer:

- plain answer: `<|user|>What does json.dumps do?<|assistant|>`
- thinking first: `<|system|>Think before you answer.<|user|>Explain json.dumps.<|assistant|>`
  continues with `<think>...</think>` and an answer
- tool call: `<|system|>You may call the tool lookup.<|user|>Look up json.dumps.<|assistant|>`
  continues with `<tool_call>{{"name": "lookup", ...}}</tool_call><|end|>`; the tool's result goes back after `<|user|>`
- text without a role is continued in the manner of a docstring, or ended at once if it reads like a whole one

Greedy decoding often falls into a loop; `generation_config.json` suggests sampling with temperature 0.7, top-p 0.9.

## How it was made

`python models/train_tiny.py --out models/tiny --steps {steps} --seed {seed}` on a CPU.

| | |
|---|---|
| text | docstrings of {symbols:,} modules, classes and functions of CPython {python}, each in four forms |
| size | {corpus_tokens:,} tokens; {seen_tokens:,} drawn at random in {steps} steps (AdamW, cosine schedule) |
| loss | {training_loss:.3f} nats per token at the end of training, {validation_loss:.3f} on held-out symbols |
| libraries | torch {torch}, transformers {transformers} |

The losses are low for such a model because the thinking and tool-call forms repeat parts of the docstring.
Docstrings that contain a mail address were left out.

## Licence

The weights are published under the project's licence (Apache-2.0). The training text is part of CPython,
copyright Python Software Foundation and contributors, under the PSF License Version 2
(<https://docs.python.org/{python_minor}/license.html>); some modules there carry further notices of their own.
The text itself is not in this repository.

## Files

| file | sha256 |
|---|---|
{files}
"""


@dataclass(frozen=True, slots=True)
class Training:
    """The facts of one training run; losses are in nats per token."""

    symbols: int
    corpus_tokens: int
    steps: int
    seen_tokens: int
    seed: int
    parameters: int
    training_loss: float
    validation_loss: float


def write_model_card(directory: Path, training: Training) -> None:
    """Write README.md over the other files of `directory`."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != "README.md")
    text = TEMPLATE.format(
        parameters=training.parameters,
        symbols=training.symbols,
        corpus_tokens=training.corpus_tokens,
        steps=training.steps,
        seen_tokens=training.seen_tokens,
        seed=training.seed,
        training_loss=training.training_loss,
        validation_loss=training.validation_loss,
        python=platform.python_version(),
        python_minor=".".join(platform.python_version_tuple()[:2]),
        torch=torch.__version__,
        transformers=transformers.__version__,
        files="\n".join(f"| {name} | `{_sha256(directory / name)}` |" for name in names),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
