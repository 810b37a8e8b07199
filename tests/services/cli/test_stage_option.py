import re

import pytest

from services.cli.stage_option import StageOptionError, parse_stage
from services.client import Stage


def test_a_stage_carries_its_slo() -> None:
    assert parse_stage("ANSWER:ttft=800,tpot=60,max=128") == Stage(60, ttft_ms=800, kind="ANSWER", max_tokens=128)


def test_a_slowdown_replaces_the_absolute_ttft() -> None:
    assert parse_stage("think:slowdown=3,tpot=50") == Stage(50, ttft_slowdown=3, kind="THINK")


@pytest.mark.parametrize(
    "text",
    [
        "PREFILL:tpot=1",
        "ANSWER:tpot=fast",
        "ANSWER:speed=1",
        "ANSWER:tpot=1,ttft=1,slowdown=2",
        "ANSWER:ttft=1",
        "ANSWER:tpot=1,max=1.5",
        "ANSWER:tpot=1,max=-1",
    ],
)
def test_nonsense_is_refused_with_the_option_quoted(text: str) -> None:
    with pytest.raises(StageOptionError, match=re.escape(text)):
        parse_stage(text)
