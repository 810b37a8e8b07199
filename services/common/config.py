"""Settings every process shares, and the YAML catalogue of tiers, applications and tenants.

A process's settings come from `SLOS_*` environment variables into one frozen object built in its `__main__`. The
catalogue is one file for the whole fleet. A bad value stops the start and names the variable or the path in the file.
"""

from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.core.slo import BEST_EFFORT, StageKind, Tier

__all__ = [
    "Application",
    "Catalogue",
    "ConfigError",
    "ServiceSettings",
    "StageTemplate",
    "Tenant",
    "load_catalogue",
    "load_settings",
]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]


class ConfigError(Exception):
    """The process cannot start with this configuration; the text names what to change."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StageTemplate(_Strict):
    """One stage of an application: a TTFT (absolute or as slowdown) on the first stage, a TPOT, where it ends."""

    kind: StageKind = StageKind.ANSWER
    ttft_ms: Milliseconds | None = None
    ttft_slowdown: Annotated[float, Field(ge=1, le=1000)] | None = None
    tpot_ms: Milliseconds
    max_tokens: Annotated[int, Field(ge=0)] = 0
    end_token: str | None = None

    @model_validator(mode="after")
    def _one_ttft(self) -> Self:
        if self.ttft_ms is not None and self.ttft_slowdown is not None:
            raise ValueError("give ttft_ms or ttft_slowdown, not both")
        return self


class Application(_Strict):
    """A named class of traffic with default stages and SLOs."""

    stages: Annotated[tuple[StageTemplate, ...], Field(min_length=1, max_length=8)]
    on_infeasible: Literal["best_effort", "reject", "wait"] = "best_effort"
    verdict: Literal["early", "late", "firm"] = "early"
    weight: Annotated[int, Field(ge=1, le=100)] = 1
    default_max_tokens: Annotated[int, Field(ge=1)] = 256

    @model_validator(mode="after")
    def _first_stage_has_ttft(self) -> Self:
        first, *rest = self.stages
        if first.ttft_ms is None and first.ttft_slowdown is None:
            raise ValueError("the first stage needs ttft_ms or ttft_slowdown")
        if any(stage.ttft_ms is not None or stage.ttft_slowdown is not None for stage in rest):
            raise ValueError("only the first stage has a first token of its own")
        return self


class Tenant(_Strict):
    """Who may call, and how tight an SLO they may ask for."""

    key: Annotated[str, Field(min_length=8)] | None = None
    min_tpot_ms: Annotated[float, Field(ge=0)] = 0.0
    min_ttft_ms: Annotated[float, Field(ge=0)] = 0.0


class Catalogue(_Strict):
    """Tiers, applications and tenants of a fleet."""

    tiers: Annotated[dict[Name, Milliseconds], Field(min_length=1, max_length=8)]
    applications: dict[Name, Application]
    tenants: dict[Name, Tenant] = {"default": Tenant()}
    ttft_floor_ms: Milliseconds = 100.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if BEST_EFFORT in self.tiers:
            raise ValueError(f"tiers: {BEST_EFFORT!r} is the built-in tier without a promise")
        if len(set(self.tiers.values())) != len(self.tiers):
            raise ValueError("tiers: two tiers share one TPOT")
        tightest = min(self.tiers.values())
        for name, application in self.applications.items():
            for index, stage in enumerate(application.stages):
                if stage.tpot_ms < tightest:
                    raise ValueError(
                        f"applications.{name}.stages.{index}.tpot_ms: {stage.tpot_ms:g} is tighter than every tier "
                        f"(tightest {tightest:g})"
                    )
        keys = [tenant.key for tenant in self.tenants.values() if tenant.key is not None]
        if len(set(keys)) != len(keys):
            raise ValueError("tenants: two tenants share one key")
        return self

    def tier_list(self) -> tuple[Tier, ...]:
        """The tiers as core values, tightest first."""
        return tuple(Tier(name, ms / 1000) for name, ms in sorted(self.tiers.items(), key=lambda item: item[1]))

    @property
    def needs_key(self) -> bool:
        """True where callers must present a key: some tenant has one."""
        return any(tenant.key is not None for tenant in self.tenants.values())


class ServiceSettings(BaseSettings):
    """What every process is told. Each service adds its own fields in its `settings.py`."""

    model_config = SettingsConfigDict(env_prefix="SLOS_", frozen=True, extra="ignore")

    host: str = "127.0.0.1"
    redis_url: str
    catalogue: Path = Path("deploy/slos.yaml")
    data_dir: Path = Path(".slos")
    drain_grace_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


S = TypeVar("S", bound=ServiceSettings)


def _refuse(source: str, error: ValidationError, prefix: str = "") -> NoReturn:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        name = f"{prefix}{where}".upper() if prefix else where
        lines.append(f"{source}: {name + ': ' if name else ''}{item['msg']}")
    raise ConfigError("\n".join(lines)) from None


def load_settings(cls: type[S]) -> S:
    """Build a process's settings from the environment; `ConfigError` names each bad `SLOS_*` variable."""
    try:
        return cls()  # type: ignore[call-arg]  # fields come from the environment
    except ValidationError as error:
        _refuse("environment", error, prefix="SLOS_")


def load_catalogue(path: Path) -> Catalogue:
    """Read the catalogue; `ConfigError` names the path inside the file and what is wrong there."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"SLOS_CATALOGUE: cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"SLOS_CATALOGUE: {path} is not valid YAML: {error}") from None
    try:
        return Catalogue.model_validate(raw)
    except ValidationError as error:
        _refuse(f"SLOS_CATALOGUE {path}", error)
