"""Typed errors of the scheduling core. All are the caller's fault: the core itself never fails on valid input."""

__all__ = ["BadModelError", "BadSloError", "BadViewError", "CoreError", "NotEnoughSamplesError", "SloTooTightError"]


class CoreError(ValueError):
    """Root of every error the core raises."""


class BadSloError(CoreError):
    """A stage or tier states something that cannot be promised (negative, NaN, contradictory)."""


class SloTooTightError(BadSloError):
    """A TPOT SLO is tighter than the tightest configured tier."""


class BadModelError(CoreError):
    """Performance-model coefficients are missing, negative, NaN or cannot grow with tokens."""


class NotEnoughSamplesError(CoreError):
    """Too few or too uniform profile samples to fit a performance model."""


class BadViewError(CoreError):
    """A replica view contradicts itself (NaN, negative counts, a tier without TPOT, more free than total blocks)."""
