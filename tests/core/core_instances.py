"""Random replicas for the property tests: small enough for brute force, nasty enough to matter."""

from dataclasses import dataclass

from hypothesis import strategies as st

from services.core.perf_model import PerfModel, Segment
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView

TPOTS_S = (0.05, 0.1, 0.075)


@dataclass(frozen=True)
class Instance:
    view: ReplicaView
    candidates: tuple[Prefill, ...]
    settings: PlanSettings


MODELS = st.sampled_from(
    [
        PerfModel((Segment(6.88e-5, b=2.48e-2), Segment(7.52e-5, b=3.0e-3))),
        PerfModel((Segment(5.1e-5, k_ctx=8e-8, k_req=1.69e-5, b=1.4e-2),)),
        PerfModel((Segment(6.04e-5, b=1.40e-2), Segment(0.0, b=3.0e-2))),
        PerfModel((Segment(4e-4, b=8e-3),), margin_s=1e-3),
        PerfModel((Segment(3.8e-5, b=3e-3),), attention=1.3e-3),
        PerfModel((Segment(5e-5, k_ctx=5e-8, b=2e-2), Segment(7e-5, b=5e-3)), attention=3e-4),
    ]
)


@st.composite
def decoders(draw: st.DrawFn, *, tiers: int, most: int, late: bool) -> tuple[Decoder, ...]:
    count = draw(st.integers(0, most))
    result = []
    for i in range(count):
        tier = draw(st.integers(0, tiers - 1))
        slack = draw(st.floats(-0.2 if late else 0.06, 0.5))
        context, remaining = draw(st.integers(1, 600)), draw(st.integers(1, 60))
        result.append(Decoder(f"d{i}", tier, 10.0 + slack, TPOTS_S[tier], context, remaining))
    return tuple(result)


@st.composite
def prefills(draw: st.DrawFn, *, tiers: int, count: int, name: str, promised: bool) -> tuple[Prefill, ...]:
    result = []
    for i in range(count):
        tier = draw(st.integers(0, tiers - 1))
        prompt = draw(st.integers(1, 3000))
        computed = draw(st.integers(0, prompt - 1)) if draw(st.booleans()) else 0
        result.append(
            Prefill(
                f"{name}{i}",
                tier,
                10.0 + draw(st.floats(0.02, 1.5)),
                TPOTS_S[tier],
                prompt,
                computed,
                draw(st.integers(1, 80)),
                promised,
                started=computed > 0,
                weight=draw(st.sampled_from([1, 1, 1, 2, 5])),
                arrival_s=10.0,
                in_hand_s=draw(st.sampled_from([0.0, 0.0, 0.004, 0.0125])),
            )
        )
    return tuple(result)


@st.composite
def instances(
    draw: st.DrawFn, *, most_candidates: int = 7, late: bool = True, tight_memory: bool | None = None
) -> Instance:
    tiers = draw(st.integers(1, 3))
    running = draw(decoders(tiers=tiers, most=draw(st.sampled_from([0, 3, 12, 30])), late=late))
    held = draw(prefills(tiers=tiers, count=draw(st.integers(0, 2)), name="p", promised=True))
    asked = draw(prefills(tiers=tiers, count=draw(st.integers(1, most_candidates)), name="c", promised=False))
    used = sum(-(-d.context_tokens // 16) for d in running) + sum(-(-p.computed_tokens // 16) for p in held + asked)
    tight = draw(st.booleans()) if tight_memory is None else tight_memory
    free = draw(st.integers(0, 400)) if tight else 10_000
    view = ReplicaView(
        10.0, draw(MODELS), running, held, free, used + free, 16, draw(st.sampled_from([512, 512, 20])), 10.0
    )
    settings = PlanSettings(
        caps_s=draw(st.sampled_from([(0.1, 0.14, 0.2), (0.1,)])),
        hold_first_token=draw(st.booleans()),
        max_batch_tokens=draw(st.sampled_from([8192, 8192, 512, 100])),
    )
    return Instance(view, asked, settings)
