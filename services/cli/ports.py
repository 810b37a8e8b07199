"""Loopback ports for a local stack: fixed ones checked, or free ones found.

Free ports are taken from below the ephemeral range, so that an outgoing connection never takes one between finding and
binding it.
"""

import random
import socket

__all__ = ["PortInUseError", "find_free_ports", "require_free"]

_FIRST, _LAST = 20_000, 32_000
_TRIES = 500


class PortInUseError(Exception):
    """A port the stack was told to use is taken."""


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def find_free_ports(count: int, host: str = "127.0.0.1") -> tuple[int, ...]:
    """`count` different free ports; `PortInUseError` where the machine has none left."""
    found: list[int] = []
    for _ in range(_TRIES):
        if len(found) == count:
            break
        port = random.randrange(_FIRST, _LAST)
        if port not in found and _is_free(host, port):
            found.append(port)
    if len(found) < count:
        raise PortInUseError(f"no {count} free ports between {_FIRST} and {_LAST} on {host}")
    return tuple(found)


def require_free(port: int, what: str, host: str = "127.0.0.1") -> None:
    """Raise `PortInUseError`, naming the service, where `port` is taken."""
    if not _is_free(host, port):
        raise PortInUseError(f"port {port} ({what}) is in use: stop what holds it, or choose others with PORT=")
