"""Is a service healthy? For container health checks: `python -m services.cli.health HOST:PORT [...]`.

Exit status 0 where every address answers `grpc.health.v1` with SERVING, else 1 and one line per address that does not.
Kept apart from `slosctl`, and free of its imports, because it runs every few seconds beside every service.
"""

import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["main", "why_unhealthy"]

_TIMEOUT_S = 3.0


def why_unhealthy(address: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Why the service at `address` is not healthy; empty where it is."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # the published types leave its methods out
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return name


def main(addresses: list[str]) -> int:
    """The exit status."""
    if not addresses:
        print("usage: python -m services.cli.health HOST:PORT [HOST:PORT ...]", file=sys.stderr)
        return 2
    found = [(address, why_unhealthy(address)) for address in addresses]
    for address, why in found:
        if why:
            print(f"{address}: {why}", file=sys.stderr)
    return int(any(why for _, why in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
