"""The bundled model's directory is complete, is what its card says, and marks stages as the services expect."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

MODEL = Path(__file__).parents[2] / "models" / "tiny"
STAGE_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_the_card_lists_every_file_with_its_checksum() -> None:
    listed = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", (MODEL / "README.md").read_text(), re.MULTILINE))
    files = {path.name: path.read_bytes() for path in MODEL.iterdir() if path.name != "README.md"}
    assert listed == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} < listed.keys()


def test_the_weights_stay_small_enough_for_a_repository() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 10_000_000


def test_configuration_and_tokenizer_agree(tokenizer: Tokenizer) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["bos_token_id"] == tokenizer.token_to_id("<|bos|>")
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.token_to_id("<|end|>")


@pytest.mark.parametrize("token", STAGE_TOKENS)
def test_a_stage_token_is_one_id_and_stays_in_the_text(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"a{token}b", add_special_tokens=False).ids
    assert [tokenizer.id_to_token(each) for each in ids].count(token) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a{token}b"


def test_roles_and_ends_are_dropped_from_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|>Hello<|end|>").ids
    assert ids[0] == tokenizer.token_to_id("<|bos|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hello"


@pytest.mark.parametrize("text", ["naïve café", "你好世界", "🙂🙃", "tab\tline\nend  ", "\x00\x7f"])
def test_any_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
