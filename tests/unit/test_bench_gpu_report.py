"""A GPU's run, as bench/gpu_run.sh leaves it, and the section of docs/benchmarks.md that it becomes.

The run below is made up: no GPU has made one yet. Its lines are those of the same steps on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.figure import Figure
from bench.gpu_report import main

ROOT = Path(__file__).parents[2]
DOCS = "# Benchmarks\n\n- [Not run yet](#not-run-yet)\n\n## All benches\n\nThese.\n\n## Not run yet\n\nThose.\n"
PROBE = """\
{"section": "facts", "torch": "2.11.0+cu130", "cuda": "13.0", "kernel": ["flash-2", "all at once"]}
{"section": "module", "name": "flashinfer", "missing": "No module named 'flashinfer'"}
{"section": "device", "name": "NVIDIA H200", "sms": 132, "free": 150000000000}
{"section": "facts", "took": 1.5}
{"section": "attention", "shape": "decode", "first_ms": 3.21987, "ms": 0.21, "tflops": 1.5, "distance": 0.0024}
{"section": "attention", "took": 2.5}
{"section": "products", "error": "RuntimeError: no memory"}
{"section": "graphs", "equal": true}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What three steps left."""
    figure = Figure("published_on_gpu", "image of 512x512, 20 steps", 0.81234, "s", 0.85, "lower", (0.81234,))
    bench = {"version": "0.1.0", "machine": {"device": "NVIDIA H200"}, "figures": [figure]}
    (tmp_path / "steps.tsv").write_text("probe\trc=0\t40\nweights\trc=124\t100\nserving\tskipped: no time left\t0\n")
    (tmp_path / "probe.log").write_text(PROBE)
    (tmp_path / "weights.log").write_text("..F\n===== 1 failed, 2 passed in 9.10s =====\n\n")
    (tmp_path / "bench.json").write_bytes(msgspec.json.encode(bench))
    (tmp_path / "docs.md").write_text(DOCS)
    return tmp_path


def test_a_run_has_every_test_for_one_gpu() -> None:
    script = (ROOT / "bench" / "gpu_run.sh").read_text()
    tests = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert {name for name in tests if f"tests/gpu/{name}" not in script} == {"test_ranks_gpu.py"}  # for two


def test_a_run_becomes_a_section_with_the_devices_name(run: Path) -> None:
    assert main([str(run), "--docs", str(run / "docs.md")]) == 0
    text = (run / "docs.md").read_text()
    assert text.startswith("# Benchmarks\n\n- [Measured on NVIDIA H200](#measured-on-nvidia-h200)\n- [Not run yet]")
    assert text.endswith("\n\n## Not run yet\n\nThose.\n")
    assert "These.\n\n## Measured on NVIDIA H200\n\n" in text
    for line in (
        "| weights | rc=124 | 100 | 1 failed, 2 passed in 9.10s |",
        "| serving | skipped: no time left | 0 |  |",
        "| image of 512x512, 20 steps | 0.8123 | s | at most 0.85 |",
        "| decode | 3.22 | 0.21 | 1.5 | 0.0024 |",
        "| True |",
    ):
        assert f"{line}\n" in text
    assert "torch 2.11.0+cu130" in text


def test_a_second_run_replaces_the_first_and_leaves_other_devices_alone(run: Path) -> None:
    docs = run / "docs.md"
    other = "## Measured on NVIDIA H100\n\nKept.\n\n"
    docs.write_text(DOCS.replace("## Not run yet", other + "## Not run yet"))
    for rate in ("1.5", "1.75"):
        (run / "probe.log").write_text(PROBE.replace("1.5,", f"{rate},"))
        assert main([str(run), "--docs", str(docs)]) == 0
    text = docs.read_text()
    assert text.count("## Measured on NVIDIA H200") == text.count("](#measured-on-nvidia-h200)") == 1
    assert other in text
    assert "| 1.75 |" in text
    assert "| 1.5 |" not in text


def test_nothing_is_written_without_a_gpu(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "bench.json").unlink()
    (run / "probe.log").write_text("")
    assert main([str(run), "--docs", str(run / "docs.md")]) == 1
    assert "no step" in capsys.readouterr().err
    assert (run / "docs.md").read_text() == DOCS
    assert main([str(run / "missing"), "--docs", str(run / "docs.md")]) == 1
    assert "bench/gpu_run.sh" in capsys.readouterr().err
