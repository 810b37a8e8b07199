"""What to do next, ready to paste: a Python call, a grpcurl call, and where to look."""

import shlex
from pathlib import Path

from rich.console import Console

__all__ = ["print_guide"]

_PYTHON = """\
PYTHONPATH=. .venv/bin/python - <<'EOF'
import asyncio
from services.client import SlosClient

async def main() -> None:
    async with SlosClient("{address}") as client:
        prompt = "<|user|>What does json.dumps do?<|assistant|>"  # the bundled model's chat template
        reply = await client.complete(prompt, templated=True, application="chatbot", max_tokens=48)
        print(reply.verdict.kind, repr(reply.text), reply.finished.stages)

asyncio.run(main())
EOF"""

_GRPCURL = """\
grpcurl -plaintext -d '{{"application": "coder", "text": "def add(a, b):", "sampling": {{"max_tokens": 16}}}}' \\
  {address} slosserve.v1.Admission/Generate"""

_SLOSCTL = """\
.venv/bin/slosctl submit "<|user|>What does json.dumps do?<|assistant|>" --templated --application chatbot{data_dir}
.venv/bin/slosctl trace --last{data_dir}
# and: slosctl replicas, slosctl queues --watch, slosctl perf"""


def print_guide(console: Console, address: str, data_dir: Path) -> None:
    """Calls that work against this very stack. Lines are never broken, so that they can be copied."""
    flag = "" if data_dir == Path(".slos") else f" --data-dir {shlex.quote(str(data_dir))}"
    for title, text in (
        ("From Python", _PYTHON.format(address=address)),
        ("From anything that speaks gRPC (reflection is on)", _GRPCURL.format(address=address)),
        ("From this terminal", _SLOSCTL.format(data_dir=flag)),
    ):
        console.print(f"\n[bold]{title}[/]")
        console.print(text, style="cyan", soft_wrap=True, markup=False)
