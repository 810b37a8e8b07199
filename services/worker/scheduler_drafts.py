"""How many draft tokens each running request verifies in a step of vLLM's scheduler, and what became of them."""

from collections.abc import Callable, Mapping, Sequence

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from services.worker.hook_request import TrackedRequest
from services.worker.hook_steering import Steering, Verified

__all__ = ["DraftLimits"]


class DraftLimits:
    """Says a steering's verified tokens per tier to an engine that drafts `num_spec_tokens` for every request."""

    def __init__(
        self, num_spec_tokens: int, tracked: Mapping[str, TrackedRequest], tier_of: Callable[[TrackedRequest], int]
    ) -> None:
        self._num_spec_tokens = num_spec_tokens
        self._tracked = tracked
        self._tier_of = tier_of
        self._verify: tuple[int, ...] | None = None  # tokens by tier, of the latest steering

    def allow(self, steering: Steering, running: Sequence[Request]) -> int:
        """Let every decoder verify as many drafts as its tier may; their room in the budget is planned already.

        vLLM shares lists of drafts between requests, so that a shorter one is always a new one. Returns by how many
        tokens the budget must grow: a waiting request that lacks only one token is scheduled with the room of a
        speculating decoder or not at all.
        """
        self._verify = steering.verify
        if self._verify is None:
            return 0
        for request in running:
            allowed = self._allowed(self._tracked[request.request_id])
            if len(request.spec_token_ids) > allowed:
                request.spec_token_ids = request.spec_token_ids[:allowed]
        return self._num_spec_tokens * sum(steering.limits[key] == 1 for key in steering.admit or ())

    def verified(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> list[Verified]:
        """What became of the drafts of a step; a decoder that was allowed some and had none counts as refused."""
        drafted = scheduler_output.scheduled_spec_decode_tokens
        found: list[Verified] = []
        for key, row in model_runner_output.req_id_to_index.items():
            tracked = self._tracked.get(key)
            if tracked is None:
                continue
            allowed = self._allowed(tracked)
            if key in drafted:
                sampled = model_runner_output.sampled_token_ids[row]
                found.append(Verified(tracked, max(allowed, len(drafted[key])), max(0, len(sampled) - 1)))
            elif allowed and tracked.decoding and scheduler_output.num_scheduled_tokens[key] == 1:
                found.append(Verified(tracked, 1, 0))
        return found

    def _allowed(self, tracked: TrackedRequest) -> int:
        """Drafts a request may verify under the latest steering."""
        if tracked.terms.probe is not None:
            return tracked.terms.probe.draft_steps
        if self._verify is None:
            return self._num_spec_tokens
        tier = self._tier_of(tracked)
        return self._verify[tier] - 1 if 0 <= tier < len(self._verify) else 0
