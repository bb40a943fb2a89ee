"""``bagel-triton demo``: serve a checkpoint, make one image with the project's client, stop."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from bagel_triton.serving import CommandError, arguments
from bagel_triton.serving.machine import source_file
from bagel_triton.serving.process import ServerNotStarted, running

IMAGE_SUFFIX = ".png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; those of the image are the client's."""
    arguments.add_checkpoint(parser)
    parser.add_argument("--prompt", default="A cute cat", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default="bagel_output.png", help="image (default: %(default)s)")
    parser.add_argument("--height", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Make one image; the client's exit status, or the server's where that did not start.

    Raises:
        CommandError: an argument is not allowed, or the server did not stop as it should.
    """
    signal.signal(signal.SIGTERM, _exit)  # so that the server is stopped then too
    _check_output(args.output)
    checkpoint = arguments.checkpoint(args.checkpoint, args.revision)
    _check_image(args, checkpoint)
    command = [sys.executable, str(source_file("client/openai_chat_client.py"))]
    for option in ("prompt", "output", "height", "width", "steps", "seed"):
        command += [f"--{option}", str(getattr(args, option))]
    try:
        with running(checkpoint, show=_show) as server:
            status = subprocess.run([*command, "--server", server.url], check=False).returncode
    except ServerNotStarted as error:
        return error.status  # it has printed why
    if status == 0:
        print(f"image: {args.output.resolve()}", flush=True)
    return status


def _check_image(args: argparse.Namespace, checkpoint: Path) -> None:
    """The server's own check of the image's size, steps and seed, before it is started for nothing."""
    from bagel_triton.model.config import CheckpointError
    from bagel_triton.protocol.errors import InvalidRequest
    from bagel_triton.protocol.request import TEXT2IMG, GenerationRequest
    from bagel_triton.protocol.validation import resolve_flow
    from bagel_triton.weights.files import CheckpointFiles

    request = GenerationRequest(height=args.height, width=args.width, num_inference_steps=args.steps, seed=args.seed)
    try:
        max_side = CheckpointFiles(checkpoint).config.latent.max_side
        resolve_flow(request, max_side, TEXT2IMG)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    except InvalidRequest as error:
        raise CommandError(f"--{error.message.replace('num_inference_steps', 'steps')}") from error


def _check_output(output: Path) -> None:
    if output.suffix.lower() != IMAGE_SUFFIX:
        raise CommandError(f"--output={output} is not allowed; the image is a PNG file, so its name ends in .png")
    folder = output.resolve().parent
    if not folder.is_dir():
        raise CommandError(f"--output={output}: {folder} is not a folder")
    if output.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        raise CommandError(f"--output={output} cannot be written")


def _show(line: str) -> None:
    print(line, end="", flush=True)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
