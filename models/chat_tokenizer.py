"""A byte-level BPE tokenizer with one id per control token, and the files that describe it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from special_tokens import ASSISTANT, BOS, CONTROL_TOKENS, END, PAD, STAGE_TOKENS, SYSTEM, USER
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = ["train_tokenizer", "write_tokenizer_config"]

# A tool's result is a message to the model, so it takes the user's marker.
CHAT_TEMPLATE: Final = (
    f"{BOS}"
    "{% for message in messages %}"
    f"{{% if message['role'] == 'system' %}}{SYSTEM}{{{{ message['content'] }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{ASSISTANT}{{{{ message['content'] }}}}{END}"
    f"{{% else %}}{USER}{{{{ message['content'] }}}}"
    "{% endif %}{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens, control tokens and all 256 bytes included: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL_TOKENS, *STAGE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return _with_visible_stage_tokens(tokenizer)


def _with_visible_stage_tokens(tokenizer: Tokenizer) -> Tokenizer:
    # The trainer takes special tokens only; "special" is what makes decoding drop a token.
    described = json.loads(tokenizer.to_str())
    for token in described["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(described))


def write_tokenizer_config(directory: Path, max_context_tokens: int) -> None:
    """Write tokenizer_config.json: token names, context length and chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": max_context_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
