"""``bagel-triton demo``: serve a checkpoint, make one image with the project's client, stop."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from bagel_triton.serving import source_tree
from bagel_triton.serving.server_process import ServerNotStarted, running


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; those of the image are the client's."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of the checkpoint")
    parser.add_argument("--prompt", default="A cute cat", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default="bagel_output.png", help="image (default: %(default)s)")
    parser.add_argument("--height", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Make one image; the client's exit status, or the server's where that did not start.

    Raises:
        CommandError: the server did not stop as it should.
    """
    signal.signal(signal.SIGTERM, _exit)  # so that the server is stopped then too
    client = source_tree.find("client/openai_chat_client.py", "the demo runs from the source tree")
    command = [sys.executable, str(client)]
    for option in ("prompt", "output", "height", "width", "steps", "seed"):
        command += [f"--{option}", str(getattr(args, option))]
    try:
        with running(args.checkpoint, show=_show) as server:
            status = subprocess.run([*command, "--server", server.url], check=False).returncode
    except ServerNotStarted as error:
        return error.status  # it has said why
    if status == 0:
        print(f"image: {args.output.resolve()}", flush=True)
    return status


def _show(line: str) -> None:
    print(line, end="", flush=True)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
