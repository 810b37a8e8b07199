"""How much of the machine a measurement had: on a shared one, a number without this says little."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

__all__ = ["MachineShare", "machine_share"]


@dataclass(frozen=True, slots=True)
class MachineShare:
    """CPU used meanwhile, in cores: by this process and its children, and by everybody else."""

    cores: int
    ours: float
    others: float


@contextmanager
def machine_share() -> Iterator[Callable[[], MachineShare]]:
    """Measures from here to the end of the block; the value is there after it."""
    found: list[MachineShare] = []
    began_s, busy_s, own_s = time.monotonic(), _busy_s(), _own_s()
    yield lambda: found[0]
    seconds = max(1e-9, time.monotonic() - began_s)
    ours = sum(max(0.0, after - own_s.get(pid, 0.0)) for pid, after in _own_s().items()) / seconds
    busy = (_busy_s() - busy_s) / seconds
    found.append(MachineShare(os.cpu_count() or 1, round(ours, 3), round(max(0.0, busy - ours), 3)))


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _own_s() -> dict[int, float]:
    """CPU seconds of this process and all below it, by process id."""
    here = psutil.Process()
    seconds = {}
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # gone meanwhile
            continue
        seconds[process.pid] = times.user + times.system
    return seconds
