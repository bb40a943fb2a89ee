"""The proxy alone, as ``bagel-triton proxy`` starts it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def proxy_process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A proxy on a free port, in a process that ends with the block, and its URL."""
    command = [sys.executable, "-m", "bagel_triton.serving.cli", "proxy", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().split()[2]
        finally:
            process.terminate()
