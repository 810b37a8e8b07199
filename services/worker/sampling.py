"""Sampling parameters as vLLM takes them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from services.worker.engine_api import SamplingSpec, Submission
from services.worker.request_terms import ProbeTerms, probe_terms, terms_of, to_extra_args

if TYPE_CHECKING:
    from vllm import SamplingParams

__all__ = ["probe_params", "sampling_params"]

_CHOICES = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty")


def sampling_params(
    submission: Submission, model_defaults: Mapping[str, Any], eos_token_ids: tuple[int, ...]
) -> "SamplingParams":
    """The parameters of a request: what it chose over what the model's generation configuration says.

    Ends of sequence are plain stop ids here, whichever source vLLM would have read them from.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    spec = submission.sampling
    stop_ids = set(spec.stop_token_ids) | (set() if spec.ignore_eos else set(eos_token_ids))
    return SamplingParams(
        **{**model_defaults, **_chosen(spec)},
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        seed=spec.seed,
        ignore_eos=True,
        stop_token_ids=sorted(stop_ids),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=to_extra_args(terms_of(submission)),
    )


def probe_params(request_id: str, steps: int, probe: ProbeTerms, only_token: int | None) -> "SamplingParams":
    """The parameters of a request that only measures; `only_token` is then all it ever says."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    max_tokens = 1 + (steps - 1) * (1 + probe.draft_steps)
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        allowed_token_ids=None if only_token is None else [only_token],
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=to_extra_args(probe_terms(request_id, max_tokens, probe)),
    )


def _chosen(spec: SamplingSpec) -> dict[str, Any]:
    return {name: value for name in _CHOICES if (value := getattr(spec, name)) is not None}
