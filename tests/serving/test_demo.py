"""``bagel-triton demo`` cut short: nothing is left behind, one line when it cannot. test_wheel.py has a whole one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
STOP_S = 20


def demo(checkpoint: Path, directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bagel_triton.serving.cli", "demo", str(checkpoint), *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory)},
    )


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path):
    with demo(tmp_path / "absent", tmp_path) as run:
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert errors.startswith("bagel-triton: error: ")
    assert str(tmp_path / "absent") in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("signal_", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_ended_early_it_takes_its_server_along(tmp_path: Path, signal_: signal.Signals):
    with demo(CHECKPOINT, tmp_path) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("  log"):  # the server is about to start tritonserver
                break
        run.send_signal(signal_)
        run.communicate(timeout=STOP_S)
    assert run.returncode == 128 + signal_
    assert list(tmp_path.glob("bagel_triton_*")) == []
