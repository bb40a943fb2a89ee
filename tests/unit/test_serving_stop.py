"""``bagel-triton serve`` that is stopped while it still looks at the checkpoint."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHECKPOINT = Path(__file__).parents[1] / "data" / "tiny-a"
STOP_S = 15


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_and_leaves_nothing(tmp_path: Path, signal_: signal.Signals) -> None:
    checkpoint = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    endless = checkpoint / "vit_config.json"
    endless.unlink()
    os.mkfifo(endless)
    with (
        subprocess.Popen(
            [sys.executable, "-m", "bagel_triton.serving.cli", "serve", str(checkpoint), "--port", "0"],
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
