"""A request as Python callers write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from protos import admission_pb2, types_pb2

__all__ = ["OnInfeasible", "Prompt", "Stage", "request_to_wire"]

OnInfeasible = Literal["BEST_EFFORT", "REJECT", "WAIT"]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with its SLO. The first one needs `ttft_ms` or `ttft_slowdown`, the others have neither."""

    tpot_ms: float
    ttft_ms: float | None = None
    ttft_slowdown: float | None = None
    kind: Literal["THINK", "TOOL_CALL", "ANSWER"] = "ANSWER"
    max_tokens: int = 0


def request_to_wire(
    prompt: Prompt,
    *,
    request_id: str = "",
    application: str = "",
    stages: Sequence[Stage] = (),
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    repetition_penalty: float | None = None,
    min_tokens: int | None = None,
    ignore_eos: bool | None = None,
    on_infeasible: OnInfeasible | None = None,
    resume_grace_s: float = 0.0,
    templated: bool = False,
    previous_request_id: str = "",
) -> admission_pb2.GenerateRequest:
    """The message. `prompt` is text or token ids; what is None is left to the application and the engine."""
    request = admission_pb2.GenerateRequest(
        request_id=request_id,
        application=application,
        stages=[_stage(stage) for stage in stages],
        sampling=types_pb2.Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
        ),
        resume_grace_s=resume_grace_s,
        templated=templated,
        previous_request_id=previous_request_id,
    )
    if on_infeasible is not None:
        request.on_infeasible = types_pb2.OnInfeasible.Value(f"ON_INFEASIBLE_{on_infeasible}")
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def _stage(stage: Stage) -> types_pb2.StageSpec:
    spec = types_pb2.StageSpec(
        kind=types_pb2.StageKind.Value(f"STAGE_KIND_{stage.kind}"), tpot_ms=stage.tpot_ms, max_tokens=stage.max_tokens
    )
    if stage.ttft_ms is not None:
        spec.ttft_ms = stage.ttft_ms
    if stage.ttft_slowdown is not None:
        spec.ttft_slowdown = stage.ttft_slowdown
    return spec
