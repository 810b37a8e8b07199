"""How much later than planned requests reach the engine.

A plan lets a candidate's prefill start with the next batch. In truth the verdict goes back to the router, the request
through its queue and into the engine, and by then a batch or two may have left. That slip is measured on every promise
and taken off the first-token deadlines of those to come.
"""

from services.core.lag import LagEstimate

__all__ = ["SlipEstimate"]


class SlipEstimate(LagEstimate):
    """Seconds from the planned start of a promised request to its arrival in the engine."""
