"""`--stage ANSWER:ttft=800,tpot=60,max=128`: one stage with an SLO of the caller's own."""

from protos import types_pb2

__all__ = ["StageOptionError", "parse_stage"]

_KINDS = {
    "THINK": types_pb2.STAGE_KIND_THINK,
    "TOOL_CALL": types_pb2.STAGE_KIND_TOOL_CALL,
    "ANSWER": types_pb2.STAGE_KIND_ANSWER,
}
_FIELDS = {"ttft": "ttft_ms", "slowdown": "ttft_slowdown", "tpot": "tpot_ms", "max": "max_tokens"}


class StageOptionError(ValueError):
    """The option is not KIND:name=value,..."""


def parse_stage(text: str) -> types_pb2.StageSpec:
    """The stage of an option value. Whether its SLO makes sense is for the server to say."""
    kind, _, rest = text.partition(":")
    if kind.upper() not in _KINDS:
        raise StageOptionError(f"{text!r}: the kind is one of {', '.join(_KINDS)}")
    stage = types_pb2.StageSpec(kind=_KINDS[kind.upper()])
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in _FIELDS:
            raise StageOptionError(f"{text!r}: {name!r} is none of {', '.join(_FIELDS)}")
        if name in ("ttft", "slowdown") and stage.WhichOneof("ttft") is not None:
            raise StageOptionError(f"{text!r}: give ttft or slowdown, once")
        try:
            setattr(stage, _FIELDS[name], int(value) if name == "max" else float(value))
        except ValueError:
            raise StageOptionError(f"{text!r}: {name} must be a number, got {value!r}") from None
    return stage
