"""What a fleet is told, and the files of deploy/ray."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from pydantic import ValidationError

from services.worker.fleet.environment import replica_environment
from services.worker.fleet.settings import FleetSettings

DEPLOY = Path(__file__).parents[3] / "deploy" / "ray"


def settings(**values: Any) -> FleetSettings:
    return FleetSettings(redis_url="redis://x", **values)


def test_a_fleet_keeps_its_size_unless_told_otherwise() -> None:
    policy = settings(replicas=3).policy
    assert (policy.min_replicas, policy.max_replicas) == (3, 3)
    policy = settings(replicas=3, max_replicas=5).policy
    assert (policy.min_replicas, policy.max_replicas) == (3, 5)


@pytest.mark.parametrize(
    "values",
    [{"replicas": 3, "max_replicas": 2}, {"replicas": 1, "min_replicas": 2}, {"scale_decline_in": 0.5}],
)
def test_contradictions_stop_the_start(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**values)


def test_a_replica_gets_the_fleets_variables_and_a_name_of_its_own(tmp_path: Path) -> None:
    base = {"SLOS_ENGINE": "emulated", "SLOS_PORT": "50061", "SLOS_DATA_DIR": str(tmp_path), "SECRET": "x"}
    found = replica_environment("ray-3", "10.0.0.7", {**base, "SLOS_ADVERTISE": "elsewhere:1"})
    assert (found["SLOS_REPLICA_ID"], found["SLOS_HOST"], found["SLOS_PORT"]) == ("ray-3", "10.0.0.7", "0")
    assert (found["SLOS_ENGINE"], found["SLOS_ADVERTISE"]) == ("emulated", "")
    assert "SECRET" not in found
    assert Path(found["SLOS_CATALOGUE"]).is_absolute()


def test_the_cluster_file_is_one_for_rays_launcher() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load((DEPLOY / "cluster.yaml").read_text(encoding="utf-8")), schema)


def test_the_kuberay_manifest_asks_for_what_its_fleet_reserves() -> None:
    manifest = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    assert manifest["spec"]["rayVersion"] == ray.__version__
    [group] = manifest["spec"]["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    head = manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    arguments = next(container["args"] for container in head if container["name"] == "fleet")
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["--gpus"] == worker["resources"]["limits"]["nvidia.com/gpu"]
    assert options["--cpus"] == worker["resources"]["requests"]["cpu"]
    assert (int(options["--min"]), int(options["--max"])) == (group["minReplicas"], group["maxReplicas"])
    parsed = FleetSettings(
        redis_url="redis://x",
        replicas=options["--replicas"],
        min_replicas=options["--min"],
        max_replicas=options["--max"],
    )
    assert parsed.policy.max_replicas == 8
