"""From a `StackSpec` to the processes it means: names, addresses, environments. Pure."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.cli.ports import find_free_ports, require_free
from services.cli.preload import preload_environment
from services.cli.service_process import ProcessSpec
from services.cli.stack_spec import StackSpec

__all__ = ["ROLES", "Addresses", "lay_out", "process_names", "process_specs", "redis_port"]

ROLES = ("planner", "router", "worker", "admission")
"""In the order of starting; the stack stops admission first, then router, worker, planner."""

_HOST = "127.0.0.1"
_NEXT_OF_ROLE = 100  # a second planner, router or admission sits this far above the first
_FIXED = {"admission": 0, "router": 1, "planner": 2, "redis": 4, "worker": 10}


@dataclass(frozen=True, slots=True)
class Addresses:
    """host:port of every process, by role and in order."""

    planner: tuple[str, ...]
    router: tuple[str, ...]
    worker: tuple[str, ...]
    admission: tuple[str, ...]

    def of(self, role: str) -> tuple[str, ...]:
        """The addresses of one role."""
        found: tuple[str, ...] = getattr(self, role)
        return found


def _counts(spec: StackSpec) -> dict[str, int]:
    return {
        "planner": spec.num_planners,
        "router": spec.num_routers,
        "worker": spec.num_workers,
        "admission": spec.num_admissions,
    }


def process_names(spec: StackSpec) -> list[str]:
    """Every service's process, without Redis, in the order of starting."""
    return [f"{role}-{index}" for role in ROLES for index in range(_counts(spec)[role])]


def lay_out(spec: StackSpec) -> Addresses:
    """Give every process its address. `PortInUseError` where a fixed port is taken."""
    counts = _counts(spec)
    if spec.base_port is None:
        free = iter(find_free_ports(sum(counts.values())))
        return Addresses(**{role: tuple(f"{_HOST}:{next(free)}" for _ in range(counts[role])) for role in ROLES})
    addresses: dict[str, tuple[str, ...]] = {}
    for role in ROLES:
        step = 1 if role == "worker" else _NEXT_OF_ROLE
        ports = [spec.base_port + _FIXED[role] + step * index for index in range(counts[role])]
        for port in ports:
            require_free(port, role)
        addresses[role] = tuple(f"{_HOST}:{port}" for port in ports)
    return Addresses(**addresses)


def redis_port(spec: StackSpec) -> int:
    """Where the embedded Redis listens."""
    if spec.base_port is None:
        return find_free_ports(1)[0]
    port = spec.base_port + _FIXED["redis"]
    require_free(port, "redis")
    return port


def process_specs(
    spec: StackSpec, addresses: Addresses, redis_url: str, base: Mapping[str, str] = os.environ
) -> Iterator[ProcessSpec]:
    """Every process of the stack, in the order of starting, with its whole environment."""
    shared = {
        **base,
        **spec.environment,
        "PYTHONUNBUFFERED": "1",
        "SLOS_HOST": _HOST,
        "SLOS_REDIS_URL": redis_url,
        "SLOS_CATALOGUE": str(spec.catalogue.resolve()),
        "SLOS_DATA_DIR": str(spec.data_dir.resolve()),
        "SLOS_DRAIN_GRACE_S": f"{spec.drain_grace_s:g}",
    }
    for role in ROLES:
        for index, address in enumerate(addresses.of(role)):
            name = f"{role}-{index}"
            yield ProcessSpec(
                name=name,
                module=f"services.{role}",
                address=address,
                environment={
                    **shared,
                    "SLOS_PORT": address.rpartition(":")[2],
                    **_own(spec, role, index, addresses, shared),
                    **spec.service_environment.get(role, {}),
                    **spec.service_environment.get(name, {}),
                },
                log_path=spec.data_dir.resolve() / "logs" / f"{name}.log",
            )


def _own(spec: StackSpec, role: str, index: int, addresses: Addresses, shared: Mapping[str, str]) -> dict[str, str]:
    match role:
        case "admission":
            return {"SLOS_ROUTERS": ",".join(addresses.router), "SLOS_MODEL": _model(spec.model)}
        case "router":
            return {"SLOS_PLANNERS": ",".join(addresses.planner)}
        case "worker":
            worker = {
                "SLOS_REPLICA_ID": f"w{index}",
                "SLOS_ADVERTISE": addresses.worker[index],
                "SLOS_PLANNERS": ",".join(addresses.planner),
                "SLOS_ENGINE": spec.engine,
                "SLOS_MODEL": _model(spec.model),
            }
            if spec.preset is not None:
                worker["SLOS_PRESET"] = spec.preset
            return worker | (preload_environment(shared) if spec.engine == "vllm" else {})
        case _:
            return {}


def _model(model: str) -> str:
    """A hub id as it is, a directory as an absolute path: the services run in the project's root."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
