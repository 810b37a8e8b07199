"""Waiting for what an engine reports; the report about a step may come after the outputs of that step."""

import asyncio
from collections.abc import Callable

from services.worker.engine_api import EngineReport
from services.worker.vllm_engine import VllmEngine

__all__ = ["snapshot_where"]


async def snapshot_where(
    engine: VllmEngine, condition: Callable[[EngineReport], bool], timeout_s: float = 30.0
) -> EngineReport:
    """The first full report that meets `condition`. Raises TimeoutError where the hook says nothing more before it."""
    reports = engine.reports()
    async with asyncio.timeout(timeout_s):
        while True:
            engine.request_snapshot()
            while not (report := await anext(reports)).full:
                pass
            if condition(report):
                return report
            await anext(reports)
