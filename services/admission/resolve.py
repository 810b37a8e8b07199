"""From a raw message to the request that would be queued: who asks, is it valid, and what do its SLOs mean here.

Generate and Quote go through the same two steps. Whatever can be refused without another process is refused here.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from protos import admission_pb2, router_pb2, types_pb2
from services.admission.arrival import Arrival
from services.admission.auth import Caller, authenticate, check_permitted
from services.admission.delivery import DeliveryLag
from services.admission.queueing import queued_request
from services.admission.request_trace import RequestTrace
from services.admission.slo import ReplicaSpeed, resolve_stages, stage_tiers
from services.admission.tokens import ModelTokens
from services.admission.validate import Known, ValidRequest, policy_of, tokenisable, validate
from services.common.config import Catalogue
from services.common.errors import Reason, SloServeError
from services.common.wire import perf_model_from_wire

__all__ = ["Checked", "Fleet", "Resolver"]

_INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that nobody's tokens wait for them."""

Fleet = Callable[[], Awaitable[Mapping[str, router_pb2.Replica]]]
"""The live replicas, read again where none was known."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A valid request, who sent it, and the replicas that were live then."""

    caller: Caller
    valid: ValidRequest
    replicas: Mapping[str, router_pb2.Replica]


class Resolver:
    """Checks and resolves messages against the catalogue, the model and the live fleet."""

    def __init__(
        self, catalogue: Catalogue, tokens: ModelTokens, admission_id: str, fleet: Fleet, lag: DeliveryLag
    ) -> None:
        self._catalogue = catalogue
        self._tiers = catalogue.tier_list()
        self._tokens = tokens
        self._admission_id = admission_id
        self._fleet = fleet
        self._lag = lag
        self._speeds_from: Mapping[str, router_pb2.Replica] | None = None
        self._speeds: Sequence[ReplicaSpeed] = ()

    def caller(self, arrival: Arrival) -> Caller:
        """The tenant of a call."""
        return authenticate(arrival.metadata, self._catalogue)

    def configured(self, application: str) -> bool:
        """Whether the catalogue has such an application."""
        return application in self._catalogue.applications

    def policy(self, request: admission_pb2.GenerateRequest) -> types_pb2.OnInfeasible.ValueType:
        """What to do with a request, not yet checked, where nobody can promise it."""
        return policy_of(request, self._catalogue.applications.get(request.application))

    async def check(self, request: admission_pb2.GenerateRequest, arrival: Arrival, trace: RequestTrace) -> Checked:
        """Authenticate, tokenise and validate. UNAUTHENTICATED, INVALID_ARGUMENT, or UNAVAILABLE (NO_REPLICA)."""
        caller = self.caller(arrival)
        replicas = await self._fleet()
        return Checked(caller, await self._validate(request, replicas, trace), replicas)

    def resolve(
        self, checked: Checked, request_id: str, arrival: Arrival, trace: RequestTrace
    ) -> types_pb2.QueuedRequest:
        """The request as it would be queued, every SLO in milliseconds.

        FAILED_PRECONDITION (SLO_IMPOSSIBLE) or PERMISSION_DENIED where its SLOs are too tight for the fleet or the
        tenant, UNAVAILABLE (NO_REPLICA) where none is live.
        """
        valid = checked.valid
        speeds = self._speeds_of(checked.replicas)
        tiers = stage_tiers(valid.stages, self._tiers)
        stages = resolve_stages(valid.stages, len(valid.prompt_ids), speeds, self._catalogue.ttft_floor_ms / 1000)
        check_permitted(checked.caller, stages)
        return queued_request(
            valid,
            stages,
            tiers,
            self._tokens,
            request_id=request_id,
            tenant=checked.caller.tenant,
            admission_id=self._admission_id,
            arrival_us=arrival.at_us,
            delivery_lag_s=self._lag.off_s(stages[0].ttft_s or 0.0),
            delivery_spread_s=self._lag.spread_s(min(stage.tpot_s for stage in stages)),
            client_deadline_us=arrival.deadline_us,
            trace=trace.context,
        )

    def alone_s(self, checked: Checked) -> float:
        """The prefill of a request on the fastest live replica, were it idle; seconds."""
        prompt_tokens = len(checked.valid.prompt_ids)
        return min((speed.idle_ttft_s(prompt_tokens) for speed in self._speeds_of(checked.replicas)), default=0.0)

    def _speeds_of(self, replicas: Mapping[str, router_pb2.Replica]) -> Sequence[ReplicaSpeed]:
        """How fast each replica that has measured itself is; worked out once per view of the fleet."""
        if replicas is not self._speeds_from:
            self._speeds_from = replicas
            self._speeds = [
                ReplicaSpeed(replica.replica_id, perf_model_from_wire(replica.perf_model))
                for replica in replicas.values()
                if replica.perf_model.segments
            ]
        return self._speeds

    async def _validate(
        self,
        request: admission_pb2.GenerateRequest,
        replicas: Mapping[str, router_pb2.Replica],
        trace: RequestTrace,
    ) -> ValidRequest:
        # what the engines really hold decides; the model's own figure only stands in until one is live
        limits = [replica.max_model_len for replica in replicas.values() if replica.max_model_len]
        context_tokens = max(limits) if limits else self._tokens.context_tokens
        if context_tokens is None:
            raise SloServeError(Reason.NO_REPLICA, "no replica is live", retry_after_ms=1000.0)
        known = Known(self._catalogue, self._tokens, context_tokens)
        ids: list[int] = []
        if tokenisable(request, known):
            with trace.step("tokenise") as span:
                encode = partial(self._tokens.encode, request.text, templated=request.templated)
                ids = await asyncio.to_thread(encode) if len(request.text) > _INLINE_CHARS else encode()
                span.set_attribute("slos_serve.prompt_tokens", len(ids))
        return validate(request, ids, known)
