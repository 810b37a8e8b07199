from dataclasses import fields

import pytest

from services.common.config import ConfigError, load_settings
from services.core.view import PlanSettings
from services.worker.engine_arguments import vllm_arguments
from services.worker.extra_arguments import RESERVED_ARGUMENTS, check_known
from services.worker.hook_config import HookConfig
from services.worker.settings import WorkerSettings


@pytest.fixture(autouse=True)
def _redis_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_REDIS_URL", "redis://127.0.0.1:6379/0")


def test_planners_are_a_comma_separated_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_PLANNERS", "p0:50053, p1:50053")
    assert load_settings(WorkerSettings).planners == ("p0:50053", "p1:50053")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SLOS_PLANNERS", ""),
        ("SLOS_PLANNERS", "p0"),
        ("SLOS_REPLICA_ID", "w:0"),
        ("SLOS_ENGINE", "other"),
        ("SLOS_PORT", "70000"),
        ("SLOS_LEASE_S", "0"),
        ("SLOS_MODEL", ""),
    ],
)
def test_a_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable):
        load_settings(WorkerSettings)


def test_an_unknown_preset_is_refused_where_it_would_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_PRESET", "abacus")
    assert load_settings(WorkerSettings).engine == "vllm"
    monkeypatch.setenv("SLOS_ENGINE", "emulated")
    with pytest.raises(ConfigError, match=r"SLOS_PRESET.*opt-13b-a100"):
        load_settings(WorkerSettings)


def test_zero_leaves_a_choice_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_KV_BLOCKS", "500")
    engine = load_settings(WorkerSettings).engine_settings()
    assert (engine.kv_blocks, engine.max_num_seqs, engine.async_scheduling) == (500, None, None)


def test_drafts_from_ngrams_need_one_batch_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_SPECULATION", "ngram")
    engine = load_settings(WorkerSettings).engine_settings()
    assert engine.speculation_tokens > 0
    assert engine.async_scheduling is False
    monkeypatch.setenv("SLOS_ASYNC_SCHEDULING", "on")
    with pytest.raises(ConfigError, match="SLOS_ASYNC_SCHEDULING must be off"):
        load_settings(WorkerSettings)


def test_vllms_own_arguments_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_ENGINE_ARGS", '{"tensor_parallel_size": 2, "quantization": "fp8"}')
    settings = load_settings(WorkerSettings).engine_settings()
    arguments = vllm_arguments(settings, HookConfig("ipc:///x", PlanSettings()), on_cpu=False)
    assert (arguments["tensor_parallel_size"], arguments["quantization"]) == (2, "fp8")
    monkeypatch.setenv("SLOS_ENGINE_ARGS", "")
    assert load_settings(WorkerSettings).engine_settings().extra == {}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ('{"scheduler_cls": "other.Scheduler"}', "scheduler_cls"),
        ('{"max_model_len": 100}', "use SLOS_MAX_MODEL_LEN"),
        ("[1]", "SLOS_ENGINE_ARGS"),
        ("{", "SLOS_ENGINE_ARGS"),
    ],
)
def test_arguments_that_would_be_in_the_way_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: str, why: str
) -> None:
    monkeypatch.setenv("SLOS_ENGINE_ARGS", arguments)
    with pytest.raises(ConfigError, match=why):
        load_settings(WorkerSettings)


def test_the_emulated_engine_takes_no_arguments_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOS_ENGINE", "emulated")
    monkeypatch.setenv("SLOS_ENGINE_ARGS", '{"quantization": "fp8"}')
    with pytest.raises(ConfigError, match=r"SLOS_ENGINE_ARGS.*emulated"):
        load_settings(WorkerSettings)


def test_every_reserved_argument_is_one_of_vllms() -> None:
    """Else a new name of vLLM's for it would go through."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert set(RESERVED_ARGUMENTS) <= {field.name for field in fields(AsyncEngineArgs)}


def test_arguments_that_vllm_does_not_have_are_named() -> None:
    known = {"quantization", "tensor_parallel_size"}
    check_known({"quantization": "fp8"}, known)
    with pytest.raises(ValueError, match=r"no engine argument 'quantisation'"):
        check_known({"quantisation": "fp8"}, known)
