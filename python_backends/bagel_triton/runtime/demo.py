"""``bagel-triton demo``: serve a checkpoint, make one picture with the project's client, stop."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from bagel_triton.runtime import source_tree
from bagel_triton.runtime.command_error import CommandError

STOP_TIMEOUT_S = 20.0  # the server's own promise is 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; those of the picture are the client's."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    parser.add_argument("--prompt", default="A cute cat", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default="bagel_output.png", help="picture (default: %(default)s)")
    parser.add_argument("--height", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Make one picture; the client's exit status, or the server's where that did not start.

    Raises:
        CommandError: the server did not stop as it should.
    """
    signal.signal(signal.SIGTERM, _exit)  # so that the server is stopped then too
    client = source_tree.find("client/openai_chat_client.py", "the demo runs from the source tree")
    command = [sys.executable, str(client)]
    for option in ("prompt", "output", "height", "width", "steps", "seed"):
        command += [f"--{option}", str(getattr(args, option))]
    with _server(args.checkpoint) as url:
        status = subprocess.run([*command, "--server", url], check=False).returncode
    if status == 0:
        print(f"picture: {args.output.resolve()}", flush=True)
    return status


@contextlib.contextmanager
def _server(checkpoint: Path) -> Iterator[str]:
    """The URL of a server on free ports, which is stopped when the context ends."""
    command = [sys.executable, "-m", "bagel_triton.runtime.cli", "serve", str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield _until_ready(server)
        finally:
            server.terminate()
            try:
                rest, _ = server.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                raise CommandError(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s") from None
            print(rest, end="", flush=True)
    if server.returncode != 0:
        raise CommandError(f"the server ended with exit status {server.returncode}")


def _until_ready(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None, "it is a pipe"
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("READY "):
            return line.split()[1]
    sys.exit(server.wait() or 1)  # it has said why


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
