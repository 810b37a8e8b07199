"""`--stage ANSWER:ttft=800,tpot=60,max=128`: one stage with an SLO of the caller's own."""

from collections.abc import Sequence
from typing import Final, Literal, cast

import typer

from services.client import Stage

__all__ = ["StageOptionError", "parse_stage", "parse_stages"]

_KINDS: Final = ("THINK", "TOOL_CALL", "ANSWER")
_NAMES: Final = ("ttft", "slowdown", "tpot", "max")


class StageOptionError(ValueError):
    """The option is not KIND:name=value,..."""


def parse_stage(text: str) -> Stage:
    """The stage of an option value. Whether its SLO makes sense is for the server to say."""
    kind, _, rest = text.partition(":")
    if kind.upper() not in _KINDS:
        raise StageOptionError(f"{text!r}: the kind is one of {', '.join(_KINDS)}")
    values: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in _NAMES:
            raise StageOptionError(f"{text!r}: {name!r} is none of {', '.join(_NAMES)}")
        try:
            values[name] = float(value)
        except ValueError:
            raise StageOptionError(f"{text!r}: {name} must be a number, got {value!r}") from None
    if "ttft" in values and "slowdown" in values:
        raise StageOptionError(f"{text!r}: give ttft or slowdown, not both")
    if "tpot" not in values:
        raise StageOptionError(f"{text!r}: tpot is missing")
    return Stage(
        kind=cast("Literal['THINK', 'TOOL_CALL', 'ANSWER']", kind.upper()),
        tpot_ms=values["tpot"],
        ttft_ms=values.get("ttft"),
        ttft_slowdown=values.get("slowdown"),
        max_tokens=_count(text, values.get("max", 0.0)),
    )


def parse_stages(texts: Sequence[str] | None) -> list[Stage]:
    """The stages of a command line, in order; typer.BadParameter where one cannot be read."""
    try:
        return [parse_stage(text) for text in texts or ()]
    except StageOptionError as error:
        raise typer.BadParameter(str(error), param_hint="--stage") from None


def _count(text: str, value: float) -> int:
    if value < 0 or value != int(value):
        raise StageOptionError(f"{text!r}: max must be a whole number, got {value:g}")
    return int(value)
