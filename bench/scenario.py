"""What is served and promised in a benchmark: scenario files, read and checked.

A scenario file names its applications (SLOs, stages, where lengths come from) and its scenarios (arrival trace,
windows, which applications). `bench.scenario_jobs` turns a scenario into requests.
"""

from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.core.slo import StageKind, Tier

__all__ = [
    "SCENARIOS",
    "AppRule",
    "Replaced",
    "ScenarioError",
    "ScenarioFile",
    "ScenarioRule",
    "StageRule",
    "load_scenarios",
]

SCENARIOS = Path(__file__).parent / "scenarios" / "evaluation.yaml"
"""The scenarios of the evaluation."""

Milliseconds = Annotated[float, Field(gt=0, le=3_600_000)]
Seconds = Annotated[float, Field(ge=0)]


class ScenarioError(ValueError):
    """A scenario file that cannot be used; the text names what to change."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageRule(_Strict):
    """One stage: its TPOT, and which part of a row's output it has, at most `max_tokens` of it."""

    kind: StageKind
    tpot_ms: Milliseconds
    tokens: Literal["thinking", "rest"] = "rest"
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class AppRule(_Strict):
    """An application. `lengths` and `sessions` name files of lengths or of sessions with several model calls.

    `last_stages` are those of a session's last call, `gaps` the sessions file whose pauses between calls are drawn.
    """

    ttft_slowdown: Annotated[float, Field(ge=1)]
    stages: Annotated[tuple[StageRule, ...], Field(min_length=1)]
    last_stages: tuple[StageRule, ...] = ()
    lengths: str | None = None
    sessions: str | None = None
    gaps: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.lengths and self.sessions:
            raise ValueError("give lengths or sessions, not both")
        if (self.gaps or self.last_stages) and not self.sessions:
            raise ValueError("gaps and last_stages belong to sessions")
        return self


class Replaced(_Strict):
    """This share of the requests is replaced by rows of other applications, in equal parts."""

    share: Annotated[float, Field(gt=0, lt=1)]
    by: Annotated[tuple[str, ...], Field(min_length=1)]


class ScenarioRule(_Strict):
    """Arrivals out of windows of a trace; `application` gives them all to one application that brings its own lengths.

    longest_request_tokens: rows with more prompt and output tokens are left out.
    poisson: arrivals are drawn anew at the window's rate, independent of one another.
    prefix_caching: switched on only where prompts share prefixes; the same for every system.
    """

    arrivals: str
    windows: Annotated[tuple[tuple[Seconds, Seconds], ...], Field(min_length=1)]
    application: str | None = None
    replaced: Replaced | None = None
    poisson: bool = False
    prefix_caching: bool = False
    most_requests: Annotated[int, Field(ge=1)] = 600
    longest_request_tokens: Annotated[int, Field(ge=2)] | None = None


class ScenarioFile(_Strict):
    """A whole file. `ttft_floor_ms`: no TTFT given as a slowdown falls below it."""

    ttft_floor_ms: Milliseconds = 100.0
    tiers: Annotated[dict[str, Milliseconds], Field(min_length=1)]
    max_model_len: Annotated[int, Field(ge=2)] = 32768
    applications: Annotated[dict[str, AppRule], Field(min_length=1)]
    scenarios: Annotated[dict[str, ScenarioRule], Field(min_length=1)]

    @model_validator(mode="after")
    def _known_applications(self) -> Self:
        for name, rule in self.scenarios.items():
            named = [rule.application] if rule.application else []
            named += rule.replaced.by if rule.replaced else ()
            for application in named:
                if application not in self.applications:
                    raise ValueError(f"scenarios.{name}: unknown application {application!r}")
                source = self.applications[application]
                if not (source.lengths or source.sessions):
                    raise ValueError(f"scenarios.{name}: application {application!r} has no lengths of its own")
        tightest_ms = min(self.tiers.values())
        for name, app in self.applications.items():
            if min(stage.tpot_ms for stage in (*app.stages, *app.last_stages)) < tightest_ms:
                raise ValueError(f"applications.{name}: a stage is tighter than every tier ({tightest_ms:g} ms)")
        return self

    def tier_list(self) -> tuple[Tier, ...]:
        """The tiers as core values, tightest first."""
        return tuple(Tier(name, ms / 1000) for name, ms in sorted(self.tiers.items(), key=lambda item: item[1]))

    def scenario(self, name: str) -> ScenarioRule:
        """The scenario of that name; ScenarioError lists the known ones."""
        if name not in self.scenarios:
            raise ScenarioError(f"no scenario {name!r}; there are: {', '.join(sorted(self.scenarios))}")
        return self.scenarios[name]


def load_scenarios(path: Path = SCENARIOS) -> ScenarioFile:
    """Read a scenario file; ScenarioError names the place in the file and what is wrong there."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path} is not valid YAML: {error}") from None
    try:
        return ScenarioFile.model_validate(raw)
    except ValidationError as error:
        _refuse(path, error)


def _refuse(path: Path, error: ValidationError) -> NoReturn:
    lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
    raise ScenarioError("\n".join(lines)) from None
