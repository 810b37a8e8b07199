"""The one door to numba: functions are compiled at their first call and the machine code is cached on disk.

numba throws a cached function away when the file it is in changes, but not when a function changes that was compiled
into it from another file. The core's kernels call each other across files, so their cache is stamped with a digest of
all of them: a change in one recompiles all (some 20 s), and no process ever runs yesterday's arithmetic.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from numba import njit

from services.core import roofline, speculation

__all__ = ["compiled", "expected_tokens", "kernel_digest", "seconds", "tokens_within"]

P = ParamSpec("P")
R = TypeVar("R")


def kernel_digest() -> str:
    """Digest of every source file that holds a kernel or a type of one."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_bytes()
        if b"@compiled" in source or b"(NamedTuple)" in source or path.stem in ("roofline", "speculation"):
            digest.update(source)
    return digest.hexdigest()


_DIGEST = kernel_digest()


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled for the argument types it is first called with."""
    dispatcher = njit(function, error_model="numpy")
    dispatcher.enable_caching()
    # numba has no public way to say what a cache entry depends on; this is the value it compares.
    dispatcher._cache._cache_file._source_stamp = _DIGEST
    return cast("Callable[P, R]", dispatcher)


expected_tokens = compiled(speculation.expected_tokens)
seconds = compiled(roofline.seconds)
tokens_within = compiled(roofline.tokens_within)
