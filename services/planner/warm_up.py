"""Compile the core before the first request needs it."""

from services.core.admission import Policy, decide
from services.core.perf_model import PerfModel, Segment
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

__all__ = ["warm_up"]


def warm_up(policy: Policy, settings: PlanSettings) -> None:
    """Run one small plan; the machine code is cached on disk, so that only the very first start waits for it."""
    view = ReplicaView(
        now_s=0.0,
        model=PerfModel((Segment(k_tok=1e-4, b=0.01),)),
        decoders=(Decoder("decodes", 0, 0.1, 0.1, 100, 10),),
        prefills=(Prefill("promised", 0, 1.0, 0.1, 200, promised=True),),
        free_blocks=100,
        total_blocks=100,
    )
    candidates = [Prefill(f"candidate-{number}", 0, 0.5, 0.1, 2000) for number in range(3)]
    decide(view, candidates, policy, settings)
