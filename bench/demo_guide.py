"""What to do next, ready to paste: a Python call, a grpcurl call, and where to look."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.syntax import Syntax
from rich.text import Text

__all__ = ["render_guide"]

_PYTHON = """\
PYTHONPATH=. .venv/bin/python - <<'EOF'
import asyncio
from services.client import SlosClient

async def main() -> None:
    async with SlosClient("{address}") as client:
        reply = await client.complete("Return the number of items.", application="chatbot", max_tokens=32)
        print(reply.verdict.kind, repr(reply.text), reply.finished.stages)

asyncio.run(main())
EOF"""

_GRPCURL = """\
grpcurl -plaintext -d '{{"application": "coder", "text": "def add(a, b):", "sampling": {{"max_tokens": 16}}}}' \\
  {address} slosserve.v1.Admission/Generate"""

_SLOSCTL = """\
.venv/bin/slosctl submit "Return the number of items in a container." --application chatbot{data_dir}
.venv/bin/slosctl trace --last{data_dir}      # also: replicas, queues --watch, perf"""


def render_guide(address: str, data_dir: Path) -> RenderableType:
    """Calls that work against this very stack."""
    flag = "" if data_dir == Path(".slos") else f" --data-dir {data_dir}"
    parts: list[RenderableType] = []
    for title, text in (
        ("From Python", _PYTHON.format(address=address)),
        ("From anything that speaks gRPC (reflection is on)", _GRPCURL.format(address=address)),
        ("From this terminal", _SLOSCTL.format(data_dir=flag)),
    ):
        parts.append(Text(f"\n{title}", style="bold"))
        parts.append(Syntax(text, "bash", theme="ansi_dark", background_color="default", word_wrap=True))
    return Group(*parts)
