"""Collects everything that is wrong with a message, so that a client learns all of it at once."""

import math

from services.common.errors import FieldViolation, InvalidRequestError

__all__ = ["Violations"]


class Violations:
    """Field violations found so far."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        """Note that `field` (its path in the message) is wrong."""
        self._found.append(FieldViolation(field, description))

    def require(self, condition: bool, field: str, description: str) -> bool:
        """Note a violation unless `condition` holds; returns the condition."""
        if not condition:
            self.add(field, description)
        return condition

    def within(
        self, value: float, field: str, low: float, high: float, *, unit: str = "", above_low: bool = False
    ) -> bool:
        """Require a finite number between `low` (excluded where `above_low`) and `high`."""
        inside = math.isfinite(value) and value <= high and (value > low if above_low else value >= low)
        bounds = f"more than {low:g} and at most {high:g}" if above_low else f"between {low:g} and {high:g}"
        return self.require(inside, field, f"must be {bounds}{unit and ' ' + unit}, got {value:g}")

    def raise_if_any(self) -> None:
        """INVALID_ARGUMENT with every violation noted."""
        if self._found:
            raise InvalidRequestError(*self._found)
