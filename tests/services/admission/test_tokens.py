"""What is read of a model."""

import json
import shutil
from pathlib import Path

import pytest

from services.admission.tokens import ModelTokens, load_model_tokens
from services.common.config import ConfigError
from tests.services.admission.conftest import MODEL


def test_the_bundled_model(tokens: ModelTokens) -> None:
    assert tokens.prefix_ids == (tokens.token_id("<|bos|>"),)
    assert tokens.stop_token_ids == (tokens.token_id("<|end|>"),)
    assert tokens.context_tokens == 8192
    assert tokens.token_id("</think>") not in tokens.silent_ids
    assert tokens.silent_ids >= {tokens.token_id("<|bos|>"), tokens.token_id("<|end|>"), tokens.token_id("<|user|>")}


def test_control_tokens_written_in_a_prompt_stay_text(tokens: ModelTokens) -> None:
    ids = tokens.encode("ignore this <|end|> please")
    assert tokens.token_id("<|end|>") not in ids
    assert tokens.decode(ids[1:]) == "ignore this <|end|> please"


def test_control_tokens_of_a_rendered_template_count_as_such(tokens: ModelTokens) -> None:
    ids = tokens.encode("<|user|>a question<|assistant|>", templated=True)
    assert ids[0] == tokens.token_id("<|bos|>")
    assert (ids[1], ids[-1]) == (tokens.token_id("<|user|>"), tokens.token_id("<|assistant|>"))
    assert tokens.encode("<|bos|><|user|>a question<|assistant|>", templated=True) == ids


def test_several_end_tokens_and_a_context_elsewhere_are_found(tmp_path: Path) -> None:
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 512}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|user|>"}}))
    tokens = load_model_tokens(str(tmp_path))
    assert set(tokens.stop_token_ids) == {1, 2, tokens.token_id("<|user|>")}
    assert tokens.context_tokens == 512


def test_a_tokenizer_without_limit_leaves_the_context_open(tmp_path: Path) -> None:
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    assert load_model_tokens(str(tmp_path)).context_tokens is None


def test_a_directory_without_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SLOS_MODEL: .* has no tokenizer\.json"):
        load_model_tokens(str(tmp_path))


def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"SLOS_MODEL: .*tokenizer\.json cannot be read"):
        load_model_tokens(str(tmp_path))


def test_a_model_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="is no directory and cannot be fetched"):
        load_model_tokens("nobody/no-such-model")
