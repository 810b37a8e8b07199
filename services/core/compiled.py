"""The one door to numba: functions are compiled at their first call and the machine code is cached on disk."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

from services.core import roofline

__all__ = ["compiled", "seconds", "tokens_within"]

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, compiled for the argument types it is first called with."""
    return cast("Callable[P, R]", njit(cache=True)(function))


seconds = compiled(roofline.seconds)
tokens_within = compiled(roofline.tokens_within)
