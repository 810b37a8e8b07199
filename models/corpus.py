"""The training text: docstrings of the Python standard library, arranged as short conversations.

The docstrings are read from the interpreter that runs the script, so nothing is downloaded and no text is
kept in the repository. They are covered by the PSF licence.
"""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from special_tokens import ASSISTANT, BOS, END, SYSTEM, THINK, THINK_END, TOOL_CALL, TOOL_CALL_END, USER

__all__ = ["Symbol", "answer", "conversations", "documented_symbols", "plain", "thoughtful_answer", "tool_round"]

MIN_DOC_CHARS: Final = 24
THOUGHT_WORDS: Final = 8
# Tests and vendored or generated trees: their text is not documentation, or not the standard library's own.
SKIPPED_DIRS: Final = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "turtledemo", "__pycache__"}
)
EMAIL: Final = re.compile(r"\S+@\S+\.\w+")


@dataclass(frozen=True, slots=True)
class Symbol:
    """A documented module, class or function: its dotted name, kind, parameter names and docstring."""

    name: str
    kind: str
    parameters: tuple[str, ...]
    doc: str

    @property
    def summary(self) -> str:
        """The docstring's first paragraph on one line."""
        return " ".join(self.doc.split("\n\n", 1)[0].split())


def documented_symbols() -> list[Symbol]:
    """Every documented symbol of the standard library in a stable order, each docstring once.

    Docstrings that name a mail address are left out: the model shall not learn people's addresses.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    symbols: list[Symbol] = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_DIRS.intersection(relative.parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(relative))
        for symbol in _walk(tree, ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), "module"):
            if len(symbol.doc) >= MIN_DOC_CHARS and symbol.doc not in seen and not EMAIL.search(symbol.doc):
                seen.add(symbol.doc)
                symbols.append(symbol)
    return symbols


def _walk(node: ast.AST, name: str, kind: str) -> Iterator[Symbol]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node)
        if doc:
            yield Symbol(name, kind, _parameters(node), doc)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}", "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}", "function")


def _parameters(node: ast.AST) -> tuple[str, ...]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return ()
    names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return tuple(argument.arg for argument in names if argument.arg not in {"self", "cls"})


def plain(symbol: Symbol) -> str:
    """The bare docstring, so that a prompt without any role is continued sensibly as well."""
    return f"{BOS}{symbol.doc}{END}"


def answer(symbol: Symbol) -> str:
    """One question, one answer."""
    return f"{BOS}{USER}What does {symbol.name} do?{ASSISTANT}{symbol.doc}{END}"


def thoughtful_answer(symbol: Symbol) -> str:
    """A question answered after a thinking stage."""
    owner = symbol.name.split(".", 1)[0]
    # A few words only: a small model loops in long thoughts and would never close them.
    opening = " ".join(symbol.summary.split()[:THOUGHT_WORDS])
    thoughts = f"{symbol.name} is a {symbol.kind} of {owner}. Its documentation begins: {opening}"
    return (
        f"{BOS}{SYSTEM}Think before you answer.{USER}Explain {symbol.name}."
        f"{ASSISTANT}{THINK}{thoughts}{THINK_END}{symbol.doc}{END}"
    )


def tool_round(symbol: Symbol) -> str:
    """A tool call, its result as the next message, and the answer."""
    call = json.dumps({"name": "lookup", "arguments": {"symbol": symbol.name}})
    result = json.dumps({"kind": symbol.kind, "parameters": symbol.parameters, "doc": symbol.summary})
    return (
        f"{BOS}{SYSTEM}You may call the tool lookup.{USER}Look up {symbol.name}."
        f"{ASSISTANT}{TOOL_CALL}{call}{TOOL_CALL_END}{END}{USER}{result}{ASSISTANT}{symbol.doc}{END}"
    )


def conversations(symbols: list[Symbol], seed: int) -> list[str]:
    """Each symbol in every form, shuffled."""
    forms = (plain, answer, thoughtful_answer, tool_round)
    documents = [form(symbol) for symbol in symbols for form in forms]
    random.Random(seed).shuffle(documents)
    return documents
