"""How many replicas a fleet should have: out on declined requests, in on replicas that stand idle.

Theory of operation. Every sample brings counts since the one before: requests offered, requests declined for want of
capacity, and how many replicas' worth of time passed without any work (`idle`). The decline rate is taken over a window
that fades; the idle replicas are averaged the same way. Pressure must last `out_after_s` before a replica is added,
slack `in_after_s` before one is removed, and either starts anew after a change, so that one burst is one step and the
two never chase each other: between `decline_in` and `decline_out`, and below `spare_idle`, nothing happens.

Placement asks the fullest replica first, so what a fleet does not need gathers on few replicas and shows as idle time.
"""

import math
from dataclasses import dataclass, replace

__all__ = ["FleetSample", "ScalingPolicy", "ScalingState", "decide_scale"]


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Bounds and hysteresis.

    decline_out, decline_in: shares of offered requests; at or above the first the fleet is too small, at or below the
        second it is not.
    spare_idle: replicas' worth of idle time from which on one replica is too many; above 1, or the next burst would
        bring it back.
    out_after_s, in_after_s: how long either must last. window_s: how long the window of the averages is.
    min_offered: fewer requests in the window than this say nothing about the decline rate.
    """

    min_replicas: int
    max_replicas: int
    decline_out: float = 0.05
    decline_in: float = 0.005
    spare_idle: float = 1.25
    out_after_s: float = 5.0
    in_after_s: float = 120.0
    window_s: float = 10.0
    min_offered: float = 3.0


@dataclass(frozen=True, slots=True)
class FleetSample:
    """The fleet at one moment, counts since the sample before.

    `ready` replicas serve, `starting` ones will. `waiting` best-effort requests have no worker yet.
    """

    at_s: float
    ready: int
    starting: int
    offered: int
    declined: int
    idle: float
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What is remembered between samples. `desired` is the answer."""

    desired: int
    offered: float = 0.0
    declined: float = 0.0
    idle: float = 0.0
    at_s: float = -math.inf
    pressed_since_s: float | None = None
    slack_since_s: float | None = None

    @property
    def decline_rate(self) -> float:
        """Declined over offered requests in the window; 0 without any. Some are declined a while after their offer."""
        return min(1.0, self.declined / self.offered) if self.offered > 0 else 0.0


def decide_scale(state: ScalingState, sample: FleetSample, policy: ScalingPolicy) -> ScalingState:
    """The state after a sample; its `desired` lies within the bounds and moves out by the share declined, in by one.

    While replicas are starting nothing more is added for the same pressure. One that finds no node is one too many all
    the same where others stand idle.
    """
    now = _faded(state, sample, policy)
    enough = now.offered >= policy.min_offered
    pressed = enough and now.decline_rate >= policy.decline_out
    calm = not enough or now.decline_rate <= policy.decline_in
    slack = calm and sample.waiting == 0 and now.idle >= policy.spare_idle
    now = replace(
        now,
        pressed_since_s=_since(state.pressed_since_s, pressed, sample.at_s),
        slack_since_s=_since(state.slack_since_s, slack, sample.at_s),
    )
    desired = min(max(now.desired, policy.min_replicas), policy.max_replicas)
    settled = sample.starting == 0 and sample.ready >= desired
    if settled and _lasted(now.pressed_since_s, sample.at_s, policy.out_after_s):
        wanted = desired + max(1, math.floor(desired * now.decline_rate))
        desired = min(wanted, policy.max_replicas)
    elif _lasted(now.slack_since_s, sample.at_s, policy.in_after_s):
        desired = max(desired - 1, policy.min_replicas)
    if desired != now.desired:
        return ScalingState(desired, at_s=sample.at_s)
    return now


def _faded(state: ScalingState, sample: FleetSample, policy: ScalingPolicy) -> ScalingState:
    elapsed_s = max(0.0, sample.at_s - state.at_s)
    keep = math.exp(-elapsed_s / policy.window_s)
    first = math.isinf(state.at_s)
    return replace(
        state,
        at_s=sample.at_s,
        offered=state.offered * keep + sample.offered,
        declined=state.declined * keep + sample.declined,
        idle=sample.idle if first else state.idle * keep + sample.idle * (1 - keep),
    )


def _since(since_s: float | None, holds: bool, now_s: float) -> float | None:
    return (now_s if since_s is None else since_s) if holds else None


def _lasted(since_s: float | None, now_s: float, long_enough_s: float) -> bool:
    return since_s is not None and now_s - since_s >= long_enough_s
