"""Bad input: the status and the fields a client is told, all at once."""

import math
from typing import Any

import pytest

from protos import admission_pb2, types_pb2
from services.admission.tokens import ModelTokens
from services.admission.validate import CUSTOM, Known, ValidRequest, tokenisable, validate
from services.common.config import Catalogue
from services.common.errors import InvalidRequestError
from tests.services.admission.world import generate

CONTEXT = 512


@pytest.fixture
def known(catalogue: Catalogue, tokens: ModelTokens) -> Known:
    return Known(catalogue, tokens, CONTEXT)


def checked(request: admission_pb2.GenerateRequest, known: Known) -> ValidRequest:
    ids = known.tokens.encode(request.text) if tokenisable(request, known) else []
    return validate(request, ids, known)


def fields(request: admission_pb2.GenerateRequest, known: Known) -> set[str]:
    with pytest.raises(InvalidRequestError) as refused:
        checked(request, known)
    return {violation.field for violation in refused.value.violations}


def sampling(**values: Any) -> admission_pb2.GenerateRequest:
    return generate(sampling=types_pb2.Sampling(**values))


def staged(*specs: types_pb2.StageSpec, **more: Any) -> admission_pb2.GenerateRequest:
    return generate(application="", stages=list(specs), **more)


def stage(**values: Any) -> types_pb2.StageSpec:
    return types_pb2.StageSpec(**{"ttft_ms": 500.0, "tpot_ms": 100.0, **values})


BAD: list[tuple[str, admission_pb2.GenerateRequest, set[str]]] = [
    ("no prompt", admission_pb2.GenerateRequest(application="chatbot"), {"prompt"}),
    ("empty text", generate(text=""), {"text"}),
    ("empty ids", generate(token_ids=admission_pb2.TokenIds()), {"token_ids.ids"}),
    ("id outside the vocabulary", generate(token_ids=admission_pb2.TokenIds(ids=[5, 4096])), {"token_ids.ids[1]"}),
    ("text that cannot fit", generate(text="x" * 100_000), {"text"}),
    ("text of too many tokens", generate(text="a b " * 600), {"text"}),
    ("too many ids", generate(token_ids=admission_pb2.TokenIds(ids=[5] * CONTEXT)), {"token_ids.ids"}),
    ("max_tokens beyond the context", sampling(max_tokens=CONTEXT), {"sampling.max_tokens"}),
    ("max_tokens 0", sampling(max_tokens=0), {"sampling.max_tokens"}),
    ("unknown application", generate(application="nonsense"), {"application"}),
    ("neither application nor stages", generate(application=""), {"application"}),
    ("bad request id", generate(request_id="has spaces"), {"request_id"}),
    ("endless request id", generate(request_id="x" * 129), {"request_id"}),
    ("unknown policy", generate(on_infeasible=9), {"on_infeasible"}),
    ("negative grace", generate(resume_grace_s=-1.0), {"resume_grace_s"}),
    ("NaN grace", generate(resume_grace_s=math.nan), {"resume_grace_s"}),
    ("endless grace", generate(resume_grace_s=1e9), {"resume_grace_s"}),
    ("negative temperature", sampling(temperature=-0.1), {"sampling.temperature"}),
    ("NaN temperature", sampling(temperature=math.nan), {"sampling.temperature"}),
    ("top_p 0", sampling(top_p=0), {"sampling.top_p"}),
    ("top_p above 1", sampling(top_p=1.01), {"sampling.top_p"}),
    ("top_k beyond the vocabulary", sampling(top_k=5000), {"sampling.top_k"}),
    ("seed too large", sampling(seed=2**63), {"sampling.seed"}),
    ("presence penalty", sampling(presence_penalty=2.5), {"sampling.presence_penalty"}),
    ("frequency penalty", sampling(frequency_penalty=-2.5), {"sampling.frequency_penalty"}),
    ("repetition penalty 0", sampling(repetition_penalty=0), {"sampling.repetition_penalty"}),
    ("min above max", sampling(max_tokens=4, min_tokens=5), {"sampling.min_tokens"}),
    ("empty stop string", sampling(stop=["ok", ""]), {"sampling.stop[1]"}),
    ("too many stop strings", sampling(stop=["x"] * 17), {"sampling.stop"}),
    ("stop string too long", sampling(stop=["x" * 257]), {"sampling.stop[0]"}),
    ("first stage without TTFT", staged(types_pb2.StageSpec(tpot_ms=50)), {"stages[0].ttft_ms"}),
    ("negative TTFT", staged(stage(ttft_ms=-1.0)), {"stages[0].ttft_ms"}),
    ("NaN TTFT", staged(stage(ttft_ms=math.nan)), {"stages[0].ttft_ms"}),
    ("infinite TTFT", staged(stage(ttft_ms=math.inf)), {"stages[0].ttft_ms"}),
    ("slowdown below 1", staged(types_pb2.StageSpec(ttft_slowdown=0.5, tpot_ms=50)), {"stages[0].ttft_slowdown"}),
    ("absurd slowdown", staged(types_pb2.StageSpec(ttft_slowdown=1e6, tpot_ms=50)), {"stages[0].ttft_slowdown"}),
    ("no TPOT", staged(types_pb2.StageSpec(ttft_ms=500)), {"stages[0].tpot_ms"}),
    ("negative TPOT", staged(stage(tpot_ms=-50.0)), {"stages[0].tpot_ms"}),
    ("absurd TPOT", staged(stage(tpot_ms=1e9)), {"stages[0].tpot_ms"}),
    ("unknown stage kind", staged(stage(kind=9)), {"stages[0].kind"}),
    ("later stage with TTFT", staged(stage(max_tokens=5), stage()), {"stages[1].ttft_ms"}),
    (
        "a stage that cannot end",
        staged(stage(), types_pb2.StageSpec(tpot_ms=100)),
        {"stages[0].max_tokens"},
    ),
    ("too many stages", staged(stage(max_tokens=1), *[types_pb2.StageSpec(tpot_ms=1, max_tokens=1)] * 8), {"stages"}),
]


@pytest.mark.parametrize(("request_", "wanted"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_names_its_field(request_: admission_pb2.GenerateRequest, wanted: set[str], known: Known) -> None:
    assert fields(request_, known) == wanted


def test_all_violations_are_told_together(known: Known) -> None:
    request = generate(
        text="", application="nonsense", resume_grace_s=-1.0, sampling=types_pb2.Sampling(temperature=9, top_p=2)
    )
    assert fields(request, known) == {
        "text",
        "application",
        "resume_grace_s",
        "sampling.temperature",
        "sampling.top_p",
    }


def test_an_applications_stages_and_limits_are_filled_in(known: Known, tokens: ModelTokens) -> None:
    valid = checked(generate(application="reasoner", sampling=types_pb2.Sampling()), known)
    think, answer = valid.stages
    assert (think.max_tokens, think.end_token_id) == (256, tokens.token_id("</think>"))
    assert answer.ttft_s is None and answer.ttft_slowdown is None
    room = CONTEXT - len(valid.prompt_ids)
    assert valid.max_tokens == min(512, room)
    assert answer.max_tokens == valid.max_tokens - 256
    assert valid.on_infeasible == types_pb2.ON_INFEASIBLE_BEST_EFFORT
    assert valid.last_stage_limit is None


def test_explicit_stages_override_and_keep_the_models_end_tokens(known: Known, tokens: ModelTokens) -> None:
    request = staged(
        stage(kind=types_pb2.STAGE_KIND_THINK),
        types_pb2.StageSpec(tpot_ms=80, max_tokens=10),
        sampling=types_pb2.Sampling(),
    )
    valid = checked(request, known)
    assert valid.application == CUSTOM
    assert valid.stages[0].end_token_id == tokens.token_id("</think>")
    assert valid.last_stage_limit == 10


def test_stage_limits_bound_the_request(known: Known) -> None:
    valid = checked(staged(stage(max_tokens=7), sampling=types_pb2.Sampling(max_tokens=100)), known)
    assert valid.max_tokens == 7
    assert valid.sampling.max_tokens == 7


def test_the_prompt_is_taken_as_ids_unchanged(known: Known) -> None:
    valid = checked(generate(token_ids=admission_pb2.TokenIds(ids=[9, 8, 7])), known)
    assert valid.prompt_ids == (9, 8, 7)
