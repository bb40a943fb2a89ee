"""``bagel-triton serve`` that is stopped while it still reads what it was given."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
STOP_S = 15


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_and_leaves_nothing(tmp_path: Path, signal_: signal.Signals) -> None:
    endless = tmp_path / "deploy.yaml"
    os.mkfifo(endless)
    command = [sys.executable, "-m", "bagel_triton.serving.cli", "serve", str(CHECKPOINT), "--port", "0"]
    with (
        subprocess.Popen(
            [*command, "--deploy-config", str(endless)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        ) as server,
        endless.open("w"),
    ):  # returns when it is being read, and there is never anything in it
        server.send_signal(signal_)
        try:
            out, errors = server.communicate(timeout=STOP_S)
        finally:
            server.kill()
    assert (server.returncode, errors) == (0, "")
    assert out.endswith(" stopping\n")
    assert list(tmp_path.glob("bagel_triton_*")) == []
