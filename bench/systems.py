"""The systems that are compared, by name, and how each is built.

| name | what it is |
|---|---|
| `vllm` | vLLM's own scheduler with budgets of 512, 2048 and 8192 tokens: `vllm-512` and so on; the best counts |
| `vllm-priority` | the same with vLLM's priority policy, tight tier first, at all three budgets |
| `vllm-bounded` | the same with a waiting queue of at most 4 to 64 requests (budget 2048); the best counts |
| `sarathi` | vLLM's scheduler with the token budget fixed at the largest batch that meets the tightest TPOT |
| `slos-greedy`, `slos-mh`, `slos-dp` | ours with one of the three admission policies |

Ours takes options, joined with `+`: `firm` (promised on arrival, or by the planner while it waits as best effort),
`late` (promised with the first token), `known` (true output lengths instead of the forecast), `nospend` (every single
token in time, none of the TPOT budget spent early on conflict), `hold` (first tokens are held until their deadline,
which banks slack; judge it by the metric `held`), `nofloor` (no floor under an application's attainment), `nopause`
(promised decoders keep their memory to their end) and `noleftover` (no best effort: what is declined never runs). Over
several replicas `leastloaded`, `roundrobin` and `poweroftwo` ask them in that order instead of the fullest first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from bench.scenario_jobs import Workload
from bench.simulator import Clock, Front
from bench.simulator_baseline import BaselineFront
from bench.simulator_call import LiveCall
from bench.simulator_engine import Engines, EngineShape
from bench.simulator_front import FrontSettings, PlannedFront
from bench.simulator_replica import Replica
from services.core.admission import Policy
from services.core.duration_cap import DurationCap
from services.core.lengths import LengthForecaster
from services.core.placement import OrderName
from services.core.presets import Preset
from services.core.slo import Tier, VerdictMode
from services.core.view import EARLY_SPEND, PlanSettings

__all__ = ["BUDGETS", "OPTIONS", "System", "UnknownSystemError", "build_front", "parse_systems"]

BUDGETS: Final = (512, 2048, 8192)
BOUNDS: Final = (4, 8, 16, 32, 64)
_ORDERS: Final = {name.value.replace("-", ""): name for name in OrderName if name is not OrderName.FULLEST_FIRST}
OPTIONS: Final = frozenset({"firm", "late", "known", "nospend", "hold", "nofloor", "noleftover", "nopause", *_ORDERS})
_DEFAULT_BUDGET = 2048
_OUR_BUDGET = 8192


class UnknownSystemError(ValueError):
    """No system has this name."""


@dataclass(frozen=True, slots=True)
class System:
    """One system. `family` is what it was asked for as: the best member of a family counts.

    token_budget 0: as large as the tightest TPOT allows. `policy` None: without admission.
    """

    name: str
    family: str
    token_budget: int = _DEFAULT_BUDGET
    priority: bool = False
    bound: int | None = None
    policy: Policy | None = None
    options: frozenset[str] = frozenset()

    @property
    def promises(self) -> bool:
        """Whether it gives verdicts."""
        return self.policy is not None


def parse_systems(names: str) -> tuple[System, ...]:
    """Systems of a comma-separated list; UnknownSystemError lists the known names."""
    return tuple(system for name in names.split(",") if name.strip() for system in _members(name.strip()))


def _members(name: str) -> list[System]:
    match = re.fullmatch(r"vllm(-priority)?(?:-(\d+))?", name)
    if match:
        budgets = (int(match[2]),) if match[2] else BUDGETS
        prefix = f"vllm{match[1] or ''}"
        return [System(f"{prefix}-{budget}", name, budget, priority=bool(match[1])) for budget in budgets]
    match = re.fullmatch(r"vllm-bounded(?:-(\d+))?", name)
    if match:
        bounds = (int(match[1]),) if match[1] else BOUNDS
        return [System(f"vllm-bounded-{bound}", name, bound=bound) for bound in bounds]
    if name == "sarathi":
        return [System(name, name, 0)]
    ours = re.fullmatch(r"slos-(greedy|mh|dp)((?:\+\w+)*)", name)
    options = frozenset(ours[2].split("+")[1:]) if ours else frozenset()
    if ours is None or not options <= OPTIONS:
        known = "vllm[-BUDGET], vllm-priority[-BUDGET], vllm-bounded[-BOUND], sarathi, slos-greedy, slos-mh, slos-dp"
        raise UnknownSystemError(f"no system {name!r}; there are: {known}; options: +{', +'.join(sorted(OPTIONS))}")
    return [System(name, name, _OUR_BUDGET, policy=Policy(ours[1]), options=options)]


def build_front(
    system: System,
    engines: Engines,
    preset: Preset,
    tiers: tuple[Tier, ...],
    workload: Workload,
    clock: Clock,
    *,
    kv_blocks: int | None = None,
    replicas: int = 1,
    depth: int = 1,
) -> Front:
    """The system with its replicas, ready for one run."""
    tightest_s = min(stage.tpot_s for job in workload.jobs for call in job.calls for stage in call.stages)
    budget = system.token_budget or preset.model.tokens_within(tightest_s)
    shape = EngineShape(
        preset, max(1, budget), system.priority, workload.rule.prefix_caching, depth, kv_blocks or preset.kv_blocks
    )
    if system.policy is None:
        schedulers = [engines.plain(shape) for _ in range(replicas)]
        return BaselineFront(_replicas(schedulers, shape, tiers, engines), system.bound)
    settings = _front_settings(system, preset, tiers)
    schedulers = [
        engines.hooked(
            shape,
            settings.plan,
            settings.policy,
            settings.floor,
            clock.read,
            pausing="nopause" not in system.options,
        )
        for _ in range(replicas)
    ]
    forecast, learn = _lengths(system, workload, preset)
    return PlannedFront(_replicas(schedulers, shape, tiers, engines), settings, forecast, learn)


def _replicas(schedulers: list[object], shape: EngineShape, tiers: tuple[Tier, ...], engines: Engines) -> list[Replica]:
    hasher = engines.block_hasher(shape)
    return [Replica(scheduler, shape, tiers, hasher) for scheduler in schedulers]


def _front_settings(system: System, preset: Preset, tiers: tuple[Tier, ...]) -> FrontSettings:
    assert system.policy is not None
    spend = 0.0 if "nospend" in system.options else EARLY_SPEND
    plan = PlanSettings(caps_s=DurationCap().caps_s(0.0, preset.model), early_spend=spend)
    if "hold" in system.options:
        plan = replace(plan, hold_first_token=True)
    return FrontSettings(
        system.policy,
        plan,
        tiers,
        verdict=next((mode for mode in VerdictMode if mode.value in system.options), VerdictMode.EARLY),
        floor=0.0 if "nofloor" in system.options else 0.85,
        best_effort="noleftover" not in system.options,
        order=next((_ORDERS[option] for option in system.options & _ORDERS.keys()), OrderName.FULLEST_FIRST),
    )


def _lengths(
    system: System, workload: Workload, preset: Preset
) -> tuple[Callable[[LiveCall], int], Callable[[LiveCall], None]]:
    """Expected output of a call, and what learns from finished ones."""
    if "known" in system.options:
        return (lambda call: call.call.output_tokens), (lambda call: None)
    forecaster = LengthForecaster()

    def forecast(call: LiveCall) -> int:
        room = preset.max_model_len - call.call.prompt_tokens
        return forecaster.forecast(call.job.application, call.call.prompt_tokens, max(1, room)).mean_tokens

    def learn(call: LiveCall) -> None:
        forecaster.observe(call.job.application, call.call.prompt_tokens, call.call.output_tokens)

    return forecast, learn
