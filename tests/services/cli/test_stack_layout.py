from pathlib import Path

import pytest

from services.cli.ports import PortInUseError, find_free_ports
from services.cli.stack_layout import lay_out, process_specs
from services.cli.stack_spec import StackSpec


def test_fixed_ports_follow_the_base_port(tmp_path: Path) -> None:
    (base,) = find_free_ports(1)
    addresses = lay_out(StackSpec(tmp_path, base_port=base, num_workers=2, num_admissions=2))
    assert addresses.admission == (f"127.0.0.1:{base}", f"127.0.0.1:{base + 100}")
    assert addresses.router == (f"127.0.0.1:{base + 1}",)
    assert addresses.planner == (f"127.0.0.1:{base + 2}",)
    assert addresses.worker == (f"127.0.0.1:{base + 10}", f"127.0.0.1:{base + 11}")


def test_a_taken_fixed_port_stops_the_start(tmp_path: Path) -> None:
    import socket

    (base,) = find_free_ports(1)
    with socket.create_server(("127.0.0.1", base + 1)), pytest.raises(PortInUseError, match="router"):
        lay_out(StackSpec(tmp_path, base_port=base))


def test_every_process_is_told_where_the_others_are(tmp_path: Path) -> None:
    spec = StackSpec(tmp_path, engine="emulated", preset="opt-6.7b-a100", num_workers=2, num_planners=2)
    addresses = lay_out(spec)
    specs = {process.name: process for process in process_specs(spec, addresses, "redis://127.0.0.1:1/0", base={})}
    assert list(specs) == ["planner-0", "planner-1", "router-0", "worker-0", "worker-1", "admission-0"]
    planners = ",".join(addresses.planner)
    assert specs["router-0"].environment["SLOS_PLANNERS"] == planners
    assert specs["admission-0"].environment["SLOS_ROUTERS"] == addresses.router[0]
    worker = specs["worker-1"].environment
    assert worker["SLOS_PLANNERS"] == planners
    assert worker["SLOS_ADVERTISE"] == addresses.worker[1]
    assert worker["SLOS_REPLICA_ID"] == "w1"
    assert (worker["SLOS_ENGINE"], worker["SLOS_PRESET"]) == ("emulated", "opt-6.7b-a100")
    assert all(process.environment["SLOS_REDIS_URL"] == "redis://127.0.0.1:1/0" for process in specs.values())


def test_environment_of_one_process_beats_that_of_its_role_and_of_all(tmp_path: Path) -> None:
    spec = StackSpec(
        tmp_path,
        num_workers=2,
        environment={"SLOS_LOG_LEVEL": "INFO"},
        service_environment={"worker": {"SLOS_LOG_LEVEL": "WARNING"}, "worker-1": {"SLOS_LOG_LEVEL": "DEBUG"}},
    )
    levels = {
        process.name: process.environment["SLOS_LOG_LEVEL"]
        for process in process_specs(spec, lay_out(spec), "redis://127.0.0.1:1/0", base={})
    }
    assert levels == {
        "planner-0": "INFO",
        "router-0": "INFO",
        "worker-0": "WARNING",
        "worker-1": "DEBUG",
        "admission-0": "INFO",
    }
