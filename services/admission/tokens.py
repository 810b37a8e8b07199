"""The served model's own tokenizer: text to ids and back, its end tokens and its context length.

Only the `tokenizers` library is used. The model is a directory, or a hub id whose few JSON files are fetched.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer

from services.common.config import ConfigError

__all__ = ["ModelTokens", "load_model_tokens"]

_FILES = ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"]
_PROBE = "a"


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """What admission knows of a model.

    `template_tokenizer` reads control tokens written out in a text as such, `tokenizer` leaves them text.
    `prefix_ids` go before every text prompt (the begin token, for most models). `silent_ids` have no text.
    `context_tokens` is the longest prompt plus output, None where the model does not say.
    `longest_token_chars` bounds how many characters one id can stand for.
    """

    tokenizer: Tokenizer
    template_tokenizer: Tokenizer
    vocabulary_size: int
    prefix_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]
    silent_ids: frozenset[int]
    context_tokens: int | None
    longest_token_chars: int

    def encode(self, text: str, *, templated: bool = False) -> list[int]:
        """Ids of a prompt, with the model's prefix unless a template brought it.

        Control tokens written out in the text stay text, except in a rendered template.
        """
        tokenizer = self.template_tokenizer if templated else self.tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        prefix = list(self.prefix_ids)
        return ids if templated and ids[: len(prefix)] == prefix else [*prefix, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, none of them dropped."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def token_id(self, token: str) -> int | None:
        """Id of one token by its text, None where the vocabulary does not have it."""
        found: int | None = self.tokenizer.token_to_id(token)
        return found


def load_model_tokens(model: str) -> ModelTokens:
    """Read the tokenizer of a model directory or hub id; `ConfigError` says what is missing."""
    directory = Path(model) if Path(model).is_dir() else _fetch(model)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"SLOS_MODEL: {model} has no tokenizer.json")
    try:
        tokenizer, template_tokenizer = Tokenizer.from_file(str(path)), Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"SLOS_MODEL: {path} cannot be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    template_tokenizer.no_truncation()
    config, generation, names = (
        _json(directory / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    stop_ids = _stop_ids(tokenizer, config, generation, names)
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return ModelTokens(
        tokenizer=tokenizer,
        template_tokenizer=template_tokenizer,
        vocabulary_size=max(vocabulary.values()) + 1,
        prefix_ids=_prefix_ids(tokenizer, names),
        stop_token_ids=stop_ids,
        silent_ids=frozenset(special | set(stop_ids)),
        context_tokens=_context_tokens(config, names),
        longest_token_chars=max(len(token) for token in vocabulary),
    )


def _fetch(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        text = str(error).strip().splitlines()[0]
        raise ConfigError(f"SLOS_MODEL: {model} is no directory and cannot be fetched from the hub: {text}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"SLOS_MODEL: {path} is not valid JSON: {error}") from None
    return read if isinstance(read, dict) else {}


def _token_text(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _stop_ids(tokenizer: Tokenizer, *configs: dict[str, Any]) -> tuple[int, ...]:
    found: set[int] = set()
    for config in configs:
        ids = config.get("eos_token_id")
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        name = _token_text(config.get("eos_token"))
        named = tokenizer.token_to_id(name) if name else None
        found.update([] if named is None else [named])
    return tuple(sorted(found))


def _prefix_ids(tokenizer: Tokenizer, names: dict[str, Any]) -> tuple[int, ...]:
    plain = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    wrapped = tokenizer.encode(_PROBE, add_special_tokens=True).ids
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain and start:
            return tuple(wrapped[:start])
    name = _token_text(names.get("bos_token"))
    bos = tokenizer.token_to_id(name) if names.get("add_bos_token") and name else None
    return () if bos is None else (bos,)


def _context_tokens(config: dict[str, Any], names: dict[str, Any]) -> int | None:
    text_config = config.get("text_config")
    for source in (config, text_config if isinstance(text_config, dict) else {}):
        limit = source.get("max_position_embeddings")
        if isinstance(limit, int) and limit > 0:
            return limit
    limit = names.get("model_max_length")
    # Tokenizers without a limit say so with an astronomically large float.
    return int(limit) if isinstance(limit, int) and 0 < limit < 100_000_000 else None
