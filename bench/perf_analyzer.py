"""``perf_analyzer``: Triton's load generator on both unary models, and on ``bagel`` with its stream of events."""

from __future__ import annotations

import csv
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bagel_triton.serving.perf_analyzer import PerfAnalyzer, prepare
from bagel_triton.serving.process import ServerProcess, running
from bench.figure import Figure
from bench.setting import Setting

NAME = "perf_analyzer"
CONCURRENCY = (1, 2, 4, 8)
MODELS = {"bagel_text2img": (), "bagel_infer": (), "bagel": ("--streaming",)}
SIDE, STEPS = 128, 10
REQUESTS = 16


def run(
    setting: Setting, concurrency: Sequence[int] = CONCURRENCY, side: int = SIDE, requests: int = REQUESTS
) -> list[Figure]:
    """Throughput and median latency for each model and concurrency, of one measurement each."""
    figures = []
    with running(setting.checkpoint, "--device", setting.device) as server, prepare() as analyzer:
        for model in MODELS:
            for at_once in concurrency:
                row = _measured(analyzer, server, model, at_once, side, requests)
                where = f"{model}, {side}x{side}, {STEPS} steps, {at_once} at a time"
                figures.append(Figure(NAME, where, float(row["Inferences/Second"]), "requests/s"))
                figures.append(Figure(NAME, where, float(row["p50 latency"]) / 1e3, "ms, median"))
    return figures


def _measured(
    analyzer: PerfAnalyzer, server: ServerProcess, model: str, at_once: int, side: int, requests: int
) -> dict[str, str]:
    """The line of perf_analyzer's report."""
    request = {"prompt": ["A cute cat"], "height": [side], "width": [side], "num_inference_steps": [STEPS], "seed": [1]}
    with tempfile.TemporaryDirectory(prefix="bagel_triton_") as folder:
        load, report = Path(folder) / "load.json", Path(folder) / "report.csv"
        load.write_text(json.dumps({"data": [request]}))
        options = [
            "-i",
            "grpc",
            *MODELS[model],
            "-u",
            server.address("Triton gRPC"),
            "--input-data",
            load,
            "-f",
            report,
        ]
        counts = ["--concurrency-range", str(at_once), "--request-count", str(max(requests, 2 * at_once))]
        command = [str(part) for part in (analyzer.program, "-m", model, *options, *counts)]
        done = subprocess.run(command, env=analyzer.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"perf_analyzer of {model} failed:\n{done.stdout}{done.stderr}")
        with report.open() as lines:
            return next(csv.DictReader(lines))
