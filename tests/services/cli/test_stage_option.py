import pytest

from protos import types_pb2
from services.cli.stage_option import StageOptionError, parse_stage


def test_a_stage_carries_its_slo() -> None:
    stage = parse_stage("ANSWER:ttft=800,tpot=60,max=128")
    assert stage == types_pb2.StageSpec(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=800, tpot_ms=60, max_tokens=128)


def test_a_slowdown_replaces_the_absolute_ttft() -> None:
    assert parse_stage("think:slowdown=3,tpot=50").ttft_slowdown == 3


@pytest.mark.parametrize("text", ["PREFILL:ttft=1", "ANSWER:tpot=fast", "ANSWER:speed=1", "ANSWER:ttft=1,slowdown=2"])
def test_nonsense_is_refused_with_the_option_quoted(text: str) -> None:
    with pytest.raises(StageOptionError, match=text.replace(".", r"\.")):
        parse_stage(text)
