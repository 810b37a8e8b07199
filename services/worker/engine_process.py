"""The engine process's bond to the worker process: it ends with it, and it ends quickly."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

__all__ = ["end_with_parent", "leave_quickly"]

_GRACE_S = 5.0  # for an orderly end
_FLUSH_S = 0.5  # for the last outputs to leave


def end_with_parent() -> None:
    """Stop this process when its parent says so or is gone, and not before.

    A worker that was killed must not leave its engine behind. Ctrl-C in a terminal reaches the whole process group, but
    the worker drains first and then stops its engine. Call on the main thread; nothing happens without a parent.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_follow, args=(parent.sentinel,), name="parent-watch", daemon=True).start()


def leave_quickly() -> None:
    """End this process soon after everything in it was shut down.

    The interpreter's own end waits for vLLM's socket threads until the parent kills it, five seconds later.
    """
    if multiprocessing.parent_process() is not None:
        threading.Thread(target=_leave, args=(_FLUSH_S, 0), name="leave", daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    _leave(_GRACE_S, 1)


def _leave(after_s: float, status: int) -> None:
    threading.Event().wait(after_s)
    os._exit(status)
