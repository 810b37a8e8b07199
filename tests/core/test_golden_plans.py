"""Plans of a handful of telling replicas, kept in `golden/` and compared field by field.

`SLOS_GOLDEN=rewrite` (or `make golden`) writes them anew; the difference is there to be reviewed.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.core.admission import Decision, Policy, decide
from services.core.batch import form_batch
from services.core.presets import preset
from services.core.view import BEST_EFFORT_TIER, Decoder, PlanSettings, Prefill, ReplicaView

GOLDEN = Path(__file__).parent / "golden"
CHOSEN = preset("opt-6.7b-a100")


def replica(decoders: tuple[Decoder, ...], prefills: tuple[Prefill, ...] = (), blocks: int = 7000) -> ReplicaView:
    used = sum(-(-d.context_tokens // 16) for d in decoders) + sum(-(-p.computed_tokens // 16) for p in prefills)
    return ReplicaView(0.0, CHOSEN.model, decoders, prefills, blocks - used, blocks)


def decoders(count: int, tier: int, slack_s: float) -> tuple[Decoder, ...]:
    tpot_s = 0.05 * (tier + 1)
    return tuple(Decoder(f"t{tier}-{i}", tier, tpot_s + slack_s, tpot_s, 200 + 9 * i, 40 + 7 * i) for i in range(count))


def requests(count: int, *, first_s: float, every_s: float, prompt: int, tier: int = 0) -> tuple[Prefill, ...]:
    return tuple(
        Prefill(
            f"c{i}", tier, first_s + every_s * i, 0.05 * (tier + 1), prompt + 83 * (i * 7 % 5), 0, 60, arrival_s=0.0
        )
        for i in range(count)
    )


PROMISED = replace(requests(1, first_s=0.4, every_s=0, prompt=300)[0], promised=True)
BULK = Prefill("bulk", BEST_EFFORT_TIER, 0.0, 1.0, 4000)
SCENES: dict[str, tuple[ReplicaView, tuple[Prefill, ...], PlanSettings]] = {
    "idle_replica_takes_a_burst": (replica(()), requests(8, first_s=0.3, every_s=0.1, prompt=500), PlanSettings()),
    "overload_drops_the_longest": (
        replica(decoders(40, 0, 0.0)),
        requests(12, first_s=0.3, every_s=0.05, prompt=700),
        PlanSettings(),
    ),
    "mixed_tiers_with_banked_slack": (
        replica((*decoders(20, 0, 0.02), *decoders(60, 1, 0.3))),
        requests(6, first_s=0.25, every_s=0.2, prompt=900, tier=1),
        PlanSettings(),
    ),
    "tight_memory": (
        replica(decoders(60, 1, 0.1), blocks=2200),
        requests(8, first_s=0.5, every_s=0.3, prompt=400, tier=1),
        PlanSettings(),
    ),
    "promises_first_then_best_effort": (
        replica(
            decoders(10, 1, 0.0), (replace(requests(1, first_s=0.4, every_s=0, prompt=300)[0], promised=True), BULK)
        ),
        (),
        PlanSettings(),
    ),
    "held_first_tokens_and_early_spending": (
        replica(decoders(60, 1, 0.0)),
        requests(14, first_s=0.35, every_s=0.04, prompt=600, tier=1),
        PlanSettings(hold_first_token=True, early_spend=0.1),
    ),
    "drafts_of_four": (
        replica(decoders(30, 0, 0.0)),
        requests(6, first_s=0.3, every_s=0.1, prompt=800),
        PlanSettings(verify_tokens=(4, 2), acceptance=(0.7, 0.7)),
    ),
}


def _in_words(decision: Decision) -> str:
    answer = "admitted" if decision.admitted else "left out"
    return f"{answer}, first token {decision.predicted_first_token_s * 1e3:.1f} ms, {decision.constraint.sentence}"


def plan_of(view: ReplicaView, candidates: tuple[Prefill, ...], settings: PlanSettings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for policy in Policy:
        decisions = decide(view, candidates, policy, settings)
        found[policy.value] = {
            "cap_ms": round(decisions.cap_s * 1e3, 3),
            "early_spend": decisions.early_spend,
            "base_feasible": decisions.base_feasible,
            "decisions": {d.id: _in_words(d) for d in decisions.decisions},
        }
    kept = set(decide(view, candidates, Policy.MH, settings).admitted_ids)
    held = (*view.prefills, *(replace(c, promised=True) for c in candidates if c.id in kept))
    batch = form_batch(view.with_prefills(held), settings)
    found["batch"] = {
        "why": batch.why,
        "decoders": len(batch.decode_ids),
        "prefill": {chunk.id: chunk.tokens for chunk in batch.prefill},
        "best_effort": {chunk.id: chunk.tokens for chunk in batch.best_effort_prefill},
    }
    return found


@pytest.mark.parametrize("scene", sorted(SCENES))
def test_the_plan_is_the_golden_one(scene: str) -> None:
    found = plan_of(*SCENES[scene])
    path = GOLDEN / f"{scene}.json"
    if os.environ.get("SLOS_GOLDEN") == "rewrite":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(path.read_text()), "plans changed: `make golden`, then review"


def test_every_golden_plan_has_its_scene() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(SCENES)
