"""Child processes that end with their parent, even where it was killed outright (Linux; elsewhere they stay)."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

__all__ = ["ends_with_parent"]

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not load anything


def ends_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` that has the kernel send the child SIGTERM once its parent is gone; None on other systems.

    The kernel means the thread that starts the child: start it from one that lives as long as the process.
    """
    libc, parent = _LIBC, os.getpid()
    if libc is None:
        return None

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the kernel was asked
            os.kill(os.getpid(), signal.SIGTERM)

    return ask
