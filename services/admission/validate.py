"""Raw `GenerateRequest` to validated request, in one place: what passes here needs no second look.

All field violations of a message are reported together.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from protos import admission_pb2, types_pb2
from services.admission.sampling import check_sampling
from services.admission.stage_specs import StatedStage, application_stages, explicit_stages, stage_slos
from services.admission.tokens import ModelTokens
from services.admission.violations import Violations
from services.common.config import Application, Catalogue
from services.core.slo import StageSlo, VerdictMode

__all__ = ["CUSTOM", "Known", "ValidRequest", "check_request_id", "tokenisable", "validate"]

CUSTOM = "custom"
"""Application name of requests that bring stages of their own and name none."""
DEFAULT_MAX_TOKENS = 256
MAX_RESUME_GRACE_S = 600.0

_REQUEST_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_POLICIES = {
    "best_effort": types_pb2.ON_INFEASIBLE_BEST_EFFORT,
    "reject": types_pb2.ON_INFEASIBLE_REJECT,
    "wait": types_pb2.ON_INFEASIBLE_WAIT,
}


@dataclass(frozen=True, slots=True)
class Known:
    """What requests are checked against. `context_tokens` bounds prompt plus output."""

    catalogue: Catalogue
    tokens: ModelTokens
    context_tokens: int


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that can be served as it stands.

    `stages` may still state a slowdown; their limits sum to at most `max_tokens`. `last_stage_limit` ends the last
    stage of a request with several (None: only `max_tokens` does). `sampling.max_tokens` is always set.
    """

    request_id: str
    application: str
    prompt_ids: tuple[int, ...]
    stages: tuple[StageSlo, ...]
    last_stage_limit: int | None
    max_tokens: int
    sampling: types_pb2.Sampling
    on_infeasible: types_pb2.OnInfeasible.ValueType
    resume_grace_s: float
    previous_request_id: str = ""
    verdict_mode: VerdictMode = VerdictMode.FIRM


def tokenisable(request: admission_pb2.GenerateRequest, known: Known) -> bool:
    """True where the text is worth tokenising: not empty, and not beyond the context even at the best ratio."""
    return 0 < len(request.text) <= known.context_tokens * known.tokens.longest_token_chars


def check_request_id(request_id: str, violations: Violations, *, needed: bool, field: str = "request_id") -> None:
    """Note an id that cannot name a request."""
    if request_id or needed:
        violations.require(
            _REQUEST_ID.match(request_id) is not None,
            field,
            "must be 1 to 128 letters, digits, dots, underscores or hyphens, the first a letter or digit",
        )


def policy_of(
    request: admission_pb2.GenerateRequest, application: Application | None
) -> types_pb2.OnInfeasible.ValueType:
    """What to do where nobody can promise: as the client says, else as its application does."""
    return request.on_infeasible or _POLICIES[application.on_infeasible if application else "best_effort"]


def validate(request: admission_pb2.GenerateRequest, text_ids: Sequence[int], known: Known) -> ValidRequest:
    """The validated request; `InvalidRequestError` lists every violation.

    `text_ids` are the ids of `request.text`, empty where it is not `tokenisable` or ids were sent.
    """
    violations = Violations()
    check_request_id(request.request_id, violations, needed=False)
    check_request_id(request.previous_request_id, violations, needed=False, field="previous_request_id")
    prompt_ids = _prompt(request, text_ids, known, violations)
    application = _application(request, known.catalogue, violations)
    stated = _stages(request, application, known.tokens, violations)
    check_sampling(request.sampling, known.tokens.vocabulary_size, violations)
    violations.require(
        request.on_infeasible in types_pb2.OnInfeasible.values(),
        "on_infeasible",
        f"{request.on_infeasible} is no policy of this version",
    )
    violations.within(request.resume_grace_s, "resume_grace_s", 0, MAX_RESUME_GRACE_S, unit="s")
    max_tokens = _max_tokens(request, application, stated, len(prompt_ids), known, violations)
    violations.raise_if_any()
    sampling = types_pb2.Sampling()
    sampling.CopyFrom(request.sampling)
    sampling.max_tokens = max_tokens
    return ValidRequest(
        request_id=request.request_id,
        application=request.application or CUSTOM,
        prompt_ids=tuple(prompt_ids),
        stages=stage_slos(stated, max_tokens),
        last_stage_limit=(stated[-1].max_tokens or None) if len(stated) > 1 else None,
        max_tokens=max_tokens,
        sampling=sampling,
        on_infeasible=policy_of(request, application),
        resume_grace_s=request.resume_grace_s,
        previous_request_id=request.previous_request_id,
        verdict_mode=VerdictMode(application.verdict) if application else VerdictMode.FIRM,
    )


def _prompt(
    request: admission_pb2.GenerateRequest, text_ids: Sequence[int], known: Known, violations: Violations
) -> Sequence[int]:
    kind = request.WhichOneof("prompt")
    if kind is None:
        violations.add("prompt", "give text or token_ids")
        return ()
    violations.require(kind == "text" or not request.templated, "templated", "only text can be a rendered template")
    field, ids = ("text", text_ids) if kind == "text" else ("token_ids.ids", request.token_ids.ids)
    if kind == "text" and len(request.text) > 0 and not tokenisable(request, known):
        violations.add("text", f"too long: {len(request.text)} characters for {known.context_tokens} tokens of context")
    elif violations.require(len(ids) > 0, field, "the prompt is empty"):
        violations.require(
            len(ids) < known.context_tokens,
            field,
            f"too long: {len(ids)} tokens leave no room for output in the context of {known.context_tokens}",
        )
    if kind == "token_ids" and ids and max(ids) >= known.tokens.vocabulary_size:
        index = next(i for i, id_ in enumerate(ids) if id_ >= known.tokens.vocabulary_size)
        violations.add(
            f"token_ids.ids[{index}]", f"{ids[index]} is outside the vocabulary of {known.tokens.vocabulary_size}"
        )
    return ids


def _application(
    request: admission_pb2.GenerateRequest, catalogue: Catalogue, violations: Violations
) -> Application | None:
    if not request.application:
        violations.require(len(request.stages) > 0, "application", "give an application, or stages of your own")
        return None
    found = catalogue.applications.get(request.application)
    if found is None:
        names = ", ".join(sorted(catalogue.applications))
        violations.add("application", f"{request.application!r} is not configured (known: {names})")
    return found


def _stages(
    request: admission_pb2.GenerateRequest, application: Application | None, tokens: ModelTokens, violations: Violations
) -> tuple[StatedStage, ...]:
    if request.stages:
        return explicit_stages(request.stages, application, tokens, violations)
    return application_stages(application, tokens) if application else ()


def _max_tokens(
    request: admission_pb2.GenerateRequest,
    application: Application | None,
    stated: Sequence[StatedStage],
    prompt_tokens: int,
    known: Known,
    violations: Violations,
) -> int:
    room = known.context_tokens - prompt_tokens
    limits = [stage.max_tokens for stage in stated]
    bounded = sum(limits) if limits and all(limits) else None
    if request.sampling.HasField("max_tokens"):
        asked = request.sampling.max_tokens
        if room > 0:
            violations.require(
                asked <= room,
                "sampling.max_tokens",
                f"a prompt of {prompt_tokens} tokens plus {asked} exceeds the context of {known.context_tokens}",
            )
        return asked if bounded is None else min(asked, bounded)
    default = application.default_max_tokens if application and bounded is None else DEFAULT_MAX_TOKENS
    return max(1, min(bounded or default, room))
