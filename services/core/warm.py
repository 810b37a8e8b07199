"""Compile everything before the first request: numba compiles at the first call, or loads what it cached on disk."""

from dataclasses import replace

from services.core.admission import Policy, decide
from services.core.batch import form_batch
from services.core.perf_model import PerfModel, Segment
from services.core.quote import retry_delays_s
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

__all__ = ["warm_up"]


def warm_up(policy: Policy = Policy.MH) -> None:
    """Run everything that `policy` needs once, on a small replica that has a conflict.

    A fraction of a second from the cache; without, some 15 s of one core, and as much again for DP.
    """
    model = PerfModel((Segment(1e-4, b=1e-2),))
    decoders = tuple(Decoder(f"d{i}", i % 2, 0.05, 0.05, 10, 5) for i in range(4))
    candidates = tuple(Prefill(f"c{i}", i % 2, 0.1, 0.05, 900, weight=1 + i % 2) for i in range(4))
    view = ReplicaView(0.0, model, decoders, (), 1000, 1004)
    drafting = PlanSettings(acceptance=(0.5, 0.5))
    for settings in (PlanSettings(early_spend=0.1), drafting, replace(drafting, verify_tokens=(2, 2))):
        decide(view, candidates, policy, settings)
        retry_delays_s(view, candidates, policy, settings)
        form_batch(replace(view, prefills=candidates), settings)
        form_batch(view, settings)
    later = [replace(candidate, deadline_s=0.3) for candidate in candidates]  # the last one is late, but not hopeless
    retry_delays_s(view, later, policy, PlanSettings())
