"""A GPU's run as a section of docs/benchmarks.md: ``python -m bench.gpu_report FOLDER``.

FOLDER is what bench/gpu_run.sh left under $OUT. The section has the device's name and stands before "Not run yet";
one of the same device is replaced. Nothing is written unless a step has found a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.figure import Figure

DOCS = Path("docs/benchmarks.md")
BEFORE = "## Not run yet\n"
COLUMNS = {  # of the probe's sections: what tells its rows apart, and what was measured
    "attention": (("shape",), ("first_ms", "ms", "tflops", "distance")),
    "products": (("rows", "inner", "outer"), ("tflops", "gbs")),
    "small": (("name",), ("us", "gbs")),
    "graphs": (("equal",), ()),
}


class Step(NamedTuple):
    """A step of the run: its exit status or why it was skipped, its seconds, and its log's last line."""

    name: str
    outcome: str
    seconds: str
    last_line: str


class _Results(msgspec.Struct):
    """What is read of ``bench.json``."""

    version: str
    machine: dict[str, Any]
    figures: list[Figure]


def section(folder: Path) -> tuple[str, str]:
    """The device's name, and the section of a run.

    Raises:
        ValueError: what is missing in ``folder``, and the command that makes it.
    """
    try:
        rows = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{folder} has no steps.tsv: run OUT={folder} bash bench/gpu_run.sh first") from error
    steps = [Step(name, outcome, seconds, _last_line(folder / f"{name}.log")) for name, outcome, seconds in rows]
    facts = _facts(folder / "probe.log")
    bench = folder / "bench.json"
    results = msgspec.json.decode(bench.read_bytes(), type=_Results) if bench.is_file() else None
    named = [fact["name"] for fact in facts if fact["section"] == "device"]
    if results is not None and results.machine["device"] != "cpu":
        named.append(results.machine["device"])
    if not named:
        raise ValueError(f"no step in {folder} has found a GPU: there is nothing to write")
    parts = [f"## Measured on {named[0]}", _sentence(facts, results)]
    parts.append(_table(("step", "outcome", "s", "last line"), steps))
    if results is not None and results.figures:
        parts.append(_table(("figure", "value", "unit", "goal"), map(_figure, results.figures)))
    for name, (keys, values) in COLUMNS.items():
        found = [fact for fact in facts if fact["section"] == name and all(key in fact for key in keys)]
        if found:
            cells = [[_cell(fact.get(key, "")) for key in (*keys, *values)] for fact in found]
            parts.append(_table((f"{name}: {keys[0]}", *keys[1:], *values), cells))
    return named[0], "\n\n".join(parts) + "\n\n"


def with_section(text: str, device: str, new: str) -> str:
    """``text`` of the document with the section ``new`` of ``device``, and a line for it in the contents.

    Raises:
        ValueError: the document has no place for it.
    """
    if BEFORE not in text:
        raise ValueError(f"the document has no section {BEFORE.strip()!r} to write before")
    title = f"Measured on {device}"
    text = re.sub(rf"^## {re.escape(title)}\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    entry, last = f"- [{title}](#{anchor})\n", "- [Not run yet](#not-run-yet)\n"
    if entry not in text:
        text = text.replace(last, entry + last)
    return text.replace(BEFORE, new + BEFORE)


def _sentence(facts: Sequence[dict[str, Any]], results: _Results | None) -> str:
    about = next((fact for fact in facts if fact["section"] == "facts"), {})
    versions = [f"torch {about['torch']}"] if "torch" in about else []
    versions += [f"version {results.version}"] if results is not None else []
    return f"{', '.join(['By `bench/gpu_run.sh`', *versions])}; random weights of the published size."


def _facts(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines if line.startswith('{"section"')]


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "" if last.startswith("{") else last.strip("= ")[:120]


def _figure(figure: Figure) -> tuple[str, ...]:
    sign = {"lower": "at most ", "higher": "at least ", None: ""}[figure.better]
    goal = "" if figure.goal is None else f"{sign}{figure.goal:g}"
    return figure.name, f"{figure.value:.4g}", figure.unit, goal


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: Sequence[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the section; the exit status is 1 where there is nothing to write."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what bench/gpu_run.sh left under $OUT")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the document (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        device, new = section(args.folder)
        args.docs.write_text(with_section(args.docs.read_text(), device, new))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.docs}: measured on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
