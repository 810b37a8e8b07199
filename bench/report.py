"""`python -m bench report`: everything in bench/results as one page, docs/results.md."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.report_files import RESULTS, load_result, markdown_table

__all__ = ["PAGE", "collect", "main"]

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
"""The page that is written."""

_HEAD = """# Results

Written by `python -m bench report` from the files in `bench/results`; [benchmarks.md](benchmarks.md) says what the
numbers mean and how to make them again.
"""


def main(
    results: Annotated[Path, typer.Option(help="folder of the result files")] = RESULTS,
    out: Annotated[Path, typer.Option(help="the page to write")] = PAGE,
) -> None:
    """Collect all results."""
    if not sorted(results.glob("*.json")):
        raise typer.BadParameter(f"{results} holds no result; run a benchmark first", param_hint="--results")
    out.write_text(collect(results, out.parent), encoding="utf-8")
    print(f"written: {out}")


def collect(results: Path, page_folder: Path) -> str:
    """The page: one section per result, capacities beside the bounds that were computed for the same settings."""
    files = sorted(results.glob("*.json"))
    loaded = [(path, load_result(path)) for path in files]
    bounds = [result for _, result in loaded if result.get("kind") == "bound"]
    sections = [_section(path, result, bounds, page_folder) for path, result in loaded]
    return "\n".join([_HEAD, *sections])


def _section(path: Path, result: dict[str, Any], bounds: Sequence[dict[str, Any]], page_folder: Path) -> str:
    link = os.path.relpath(path, page_folder)
    parts = [f"## {path.stem}\n", _settings(result), f"[{path.name}]({link})\n"]
    text = path.with_suffix(".md")
    if text.is_file():
        parts.append(text.read_text(encoding="utf-8"))
    if result.get("kind") == "capacity":
        parts += [_windows(result), _against_bounds(result, bounds)]
    plot = path.with_suffix(".png")
    if plot.is_file():
        parts.append(f"![{path.stem}]({os.path.relpath(plot, page_folder)})\n")
    return "\n".join(part for part in parts if part)


def _settings(result: dict[str, Any]) -> str:
    said = [f"{name} {value}" for name, value in sorted(result.get("settings", {}).items())]
    preset = result.get("preset")
    if isinstance(preset, dict):
        said.insert(0, str(preset["name"]))
    return ", ".join(said) + "\n" if said else ""


def _windows(result: dict[str, Any]) -> str:
    """Capacity by window: the worst counts as much as the mean."""
    places = sorted({(row["scenario"], row["window"], row["seed"]) for row in result["rows"]})
    systems = list(dict.fromkeys(row["system"] for row in result["rows"]))
    found = {(row["scenario"], row["window"], row["seed"], row["system"]): row["capacity"] for row in result["rows"]}
    rows = [
        [f"{scenario} w{window} seed {seed}"]
        + [f"{found[scenario, window, seed, s]:.2f}" if (scenario, window, seed, s) in found else "" for s in systems]
        for scenario, window, seed in places
    ]
    return markdown_table(["by window", *systems], rows)


def _against_bounds(result: dict[str, Any], bounds: Iterable[dict[str, Any]]) -> str:
    """The share of the hindsight bound that every system reaches, over the windows for which there is one."""
    settings = result["settings"]
    known = {
        (row["scenario"], row["window"], row["seed"]): row["bound"]
        for bound in bounds
        if bound["preset"]["name"] == result["preset"]["name"]
        and str(bound["settings"]["kv_blocks"]) == str(settings["kv_blocks"])
        for row in bound["rows"]
    }
    shares: dict[tuple[str, str], list[float]] = {}
    for row in result["rows"]:
        bound = known.get((row["scenario"], row["window"], row["seed"]))
        if bound:
            shares.setdefault((row["scenario"], row["system"]), []).append(row["capacity"] / bound)
    if not shares or settings["metric"] != "met" or settings["replicas"] != 1:
        return ""
    rows = [
        [f"{scenario}, {system}", f"{sum(values) / len(values):.2f}", f"{min(values):.2f}", str(len(values))]
        for (scenario, system), values in sorted(shares.items())
    ]
    return markdown_table(["share of the hindsight bound", "mean", "worst", "windows"], rows)
