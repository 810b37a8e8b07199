"""Make the bundled model: train its tokenizer and weights on this CPU and write a directory that vLLM loads.

Run `python models/train_tiny.py --out models/tiny`. The same seed, thread count, Python and library versions
give the same tokenizer and, up to the order of floating-point sums, the same weights.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from chat_tokenizer import train_tokenizer, write_tokenizer_config
from corpus import Symbol, conversations, documented_symbols
from model_card import Training, write_model_card
from special_tokens import BOS, END, PAD
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["Settings", "main"]

HELD_OUT_SHARE: Final = 0.02
# Most steps see short windows; the last fifth sees long ones, so that long prompts do not derail the model.
SHORT_WINDOW: Final = (8, 512)
LONG_WINDOW: Final = (2, 2048)
LONG_FROM: Final = 0.8
VALIDATION_WINDOWS: Final = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says; `steps` optimiser steps of about 4096 tokens each."""

    out: Path
    steps: int
    seed: int
    threads: int
    learning_rate: float


def _settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=850, help="optimiser steps of about 4096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    return Settings(**vars(parser.parse_args()))


def _split(symbols: list[Symbol], seed: int) -> tuple[list[Symbol], list[Symbol]]:
    """Symbols to train on and symbols never seen, for an honest loss."""
    shuffled = random.Random(seed).sample(symbols, len(symbols))
    held_out = math.ceil(len(shuffled) * HELD_OUT_SHARE)
    return shuffled[held_out:], shuffled[:held_out]


def _encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    encodings = tokenizer.encode_batch(documents, add_special_tokens=False)
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


def _new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def _windows(stream: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """One batch of random windows per step, shape (sequences, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        sequences, tokens = LONG_WINDOW if step >= LONG_FROM * steps else SHORT_WINDOW
        starts = torch.randint(len(stream) - tokens, (sequences,), generator=generator)
        yield torch.stack([stream[start : start + tokens] for start in starts.tolist()])


def _rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a twentieth of the peak."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def _train(model: LlamaForCausalLM, stream: torch.Tensor, settings: Settings) -> float:
    """Train in place; returns the mean loss of the last twentieth of the steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    started_s = time.monotonic()
    model.train()
    for step, batch in enumerate(_windows(stream, settings.steps, settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, settings.steps, settings.learning_rate)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == settings.steps - 1:
            print(f"step {step:5d}  loss {losses[-1]:.3f}  {time.monotonic() - started_s:6.0f} s", flush=True)
    last = losses[-max(1, settings.steps // 20) :]
    return sum(last) / len(last)


def _validation_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Loss in nats per token on text whose symbols were never trained on."""
    model.eval()
    tokens = SHORT_WINDOW[1]
    windows = stream[: len(stream) // tokens * tokens].view(-1, tokens)[:VALIDATION_WINDOWS]
    with torch.no_grad():
        return float(model(input_ids=windows, labels=windows).loss)


def _write(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write every file of the model but its card."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    write_tokenizer_config(out, model.config.max_position_embeddings)
    generation = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": model.config.eos_token_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train the tokenizer, train the weights, measure the rounded weights, write everything."""
    settings = _settings()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    seen, unseen = _split(documented_symbols(), settings.seed)
    documents = conversations(seen, settings.seed)
    tokenizer = train_tokenizer(documents, vocab_size=4096)
    stream = _encode(tokenizer, documents)
    model = _new_model(tokenizer)
    training_loss = _train(model, stream, settings)
    # What is served is what is measured: round to the stored precision first.
    held_out_stream = _encode(tokenizer, conversations(unseen, settings.seed))
    validation_loss = _validation_loss(model.to(torch.bfloat16), held_out_stream)
    _write(model, tokenizer, settings.out)
    training = Training(
        symbols=len(seen),
        corpus_tokens=len(stream),
        steps=settings.steps,
        seen_tokens=settings.steps * SHORT_WINDOW[0] * SHORT_WINDOW[1],
        seed=settings.seed,
        parameters=sum(weight.numel() for weight in model.parameters()),
        training_loss=training_loss,
        validation_loss=validation_loss,
    )
    write_model_card(settings.out, training)
    print(f"wrote {settings.out}: training loss {training_loss:.3f}, held-out loss {validation_loss:.3f}")


if __name__ == "__main__":
    main()
