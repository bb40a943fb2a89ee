"""``python -m bagel_triton.bench.suite``: the measurements that need no server, printed and kept in a file."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bagel_triton.bench import kv_handoff, weight_sharing

RESULTS = Path("bench/results.json")


def run() -> dict[str, list[dict[str, Any]]]:
    """Rows of each measurement by its name; tables are printed meanwhile."""
    print(f"kv_handoff\n{kv_handoff.HEADER}")
    handoffs = []
    for row in kv_handoff.run():
        print(kv_handoff.line(row), flush=True)
        handoffs.append(asdict(row))
    sharing = []
    for dtype, measured in weight_sharing.run():
        print(f"\nweight_sharing, {dtype}\n{weight_sharing.report(measured)}", flush=True)
        sharing.append({"dtype": dtype, "copies": measured.copies, **asdict(measured)})
    return {"kv_handoff": handoffs, "weight_sharing": sharing}


def machine() -> dict[str, Any]:
    """What was measured on, as far as numbers depend on it."""
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def merge(path: Path, found: dict[str, Any]) -> None:
    """Put ``found`` into the JSON file, beside what other measurements left there."""
    kept = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept | found, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").rpartition(": ")[2])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    merge(args.output, {"machine": machine(), **run()})
    print(f"\nkept in {args.output}")


if __name__ == "__main__":
    main()
