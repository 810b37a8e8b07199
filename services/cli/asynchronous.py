"""Runs an async command: its errors become one red line and an exit status, never a traceback."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import grpc
import grpc.aio
import typer
from redis.exceptions import RedisError
from rich.console import Console

from services.common.config import ConfigError
from services.common.errors import Reason, SloServeError, from_rpc_error

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "EXIT_REJECTED", "CommandError", "fail", "run_async"]

EXIT_FAILED = 1
EXIT_REJECTED = 3  # shed load: try again later
EXIT_INTERRUPTED = 130

P = ParamSpec("P")


class CommandError(Exception):
    """A command cannot do what it was asked; the text is for people."""


def fail(text: str, status: int = EXIT_FAILED) -> typer.Exit:
    """Print why a command failed, and return the exit to raise."""
    Console(stderr=True).print(text, style="red", highlight=False, markup=False)
    return typer.Exit(status)


def _explain(error: SloServeError, code: grpc.StatusCode) -> typer.Exit:
    """`code` is the status as received: a service that is not there gives UNAVAILABLE and no reason of ours."""
    status = code.name if error.code is not code else f"{error.reason.value} ({code.name})"
    text = f"{status}: {error.text}"
    if error.retry_after_ms is not None:
        text += f"\nretry after {error.retry_after_ms:.0f} ms"
    if "request_id" in error.metadata:  # it was refused a place
        text += f"\nslosctl explain {error.metadata['request_id']}"
    return fail(text, EXIT_REJECTED if error.reason is Reason.NO_CAPACITY else EXIT_FAILED)


def run_async(command: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a synchronous command of an async one, with the signature typer needs to see."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            asyncio.run(command(*args, **kwargs))
        except SloServeError as error:
            raise _explain(error, error.code) from None
        except grpc.aio.AioRpcError as error:
            raise _explain(from_rpc_error(error), error.code()) from None
        except (CommandError, ConfigError, RedisError) as error:
            raise fail(str(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run
