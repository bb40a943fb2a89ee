"""``bagel-triton demo``: serve a checkpoint, ask it for everything it can do with the project's client, stop."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from PIL import Image, ImageDraw, ImageFont

from bagel_triton.serving import CommandError, flags
from bagel_triton.serving.machine import source_file
from bagel_triton.serving.process import ServerNotStarted, running

IMAGE_SUFFIX = ".png"
SIDE = 256  # of the images asked for, unless the checkpoint's are smaller
TILE, MARGIN, LINE, FONT = 256, 16, 20, 15  # of the contact sheet, in pixels
LONGEST = 300  # letters of an answer on the sheet
DRAWN, EDITED, PLANNED = "drawn.png", "edited.png", "planned.png"


@dataclass(frozen=True)
class Shown:
    """One request on the contact sheet: its prompt and its answer; ``image`` is a file, or None."""

    title: str
    asked: str
    answer: str
    image: Path | None = None


class _Failed(Exception):
    """The client ended with this exit status, and has said why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    flags.add_checkpoint(parser, optional=True)
    drawing = "a red circle on a blue background"
    parser.add_argument("--prompt", default=drawing, help="image to draw (default: %(default)s)")
    parser.add_argument("--edit", default="make the circle yellow", help="change of that image (default: %(default)s)")
    parser.add_argument("--describe", default="Describe this image.", help="asked of the result (default: %(default)s)")
    question = "What is the capital of France?"
    parser.add_argument("--question", default=question, help="chat without an image (default: %(default)s)")
    parser.add_argument("--planned", default="A cute cat", help="image to draw after thinking (default: %(default)s)")
    parser.add_argument("--output", type=Path, default="bagel_demo.png", help="contact sheet (default: %(default)s)")
    side = f"pixels (default: {SIDE}, or the side of the checkpoint's images below it)"
    parser.add_argument("--height", type=int, help=side)
    parser.add_argument("--width", type=int, help=side)
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Five requests and their contact sheet; the client's exit status, or the server's where that did not start.

    Raises:
        CommandError: an argument is not allowed, or the server did not stop as it should.
    """
    signal.signal(signal.SIGTERM, _exit)  # so that the server is stopped then too
    _check_output(args.output)
    checkpoint = flags.checkpoint(args.checkpoint, args.revision)
    _resolve_image(args, checkpoint)
    with tempfile.TemporaryDirectory(prefix="bagel_triton_demo_") as folder:
        try:
            with running(checkpoint, "--served-model-name", "bagel", show=_show) as server:
                shown = list(_requests(args, server.url, Path(folder)))
        except ServerNotStarted as error:
            return error.status  # it has printed why
        except _Failed as failed:
            return int(str(failed))
        contact_sheet(shown).save(args.output)
    print(f"\ncontact sheet: {args.output.resolve()}", flush=True)
    return 0


def _requests(args: argparse.Namespace, url: str, folder: Path) -> Iterator[Shown]:
    """The five requests, one after the other, as commands of the project's client."""
    size = ["--height", str(args.height), "--width", str(args.width)]
    flow = ["--steps", str(args.steps), "--seed", str(args.seed)]

    def ask(title: str, prompt: str, *options: str, image: str | None = None) -> Shown:
        output = ["--output", image] if image else []
        done = _client(url, folder, ["--prompt", prompt, *options, *output])
        _, _, thought = done.stderr.partition("thinking:\n")
        answer = " ".join((thought if image else done.stdout).split())
        return Shown(title, prompt, answer, folder / image if image else None)

    yield ask("text to image", args.prompt, *size, *flow, image=DRAWN)
    yield ask("edit", args.edit, "-m", "img2img", "-i", DRAWN, *size, *flow, image=EDITED)
    yield ask("think, then draw", args.planned, "--think", "--max-think-tokens", "200", *size, *flow, image=PLANNED)
    yield ask("image to text", args.describe, "-m", "img2text", "-i", EDITED, "--max-tokens", "60")
    yield ask("chat", args.question, "-m", "text2text", "--max-tokens", "60")


def _client(url: str, folder: Path, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the client in ``folder`` and show its output."""
    client = source_file("client/openai_chat_client.py")
    print(f"\n$ {client.name} {shlex.join(options)}", flush=True)
    command = [sys.executable, str(client), "--server", url, *options]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    print(done.stderr + done.stdout, end="", flush=True)
    if done.returncode != 0:
        raise _Failed(done.returncode)
    return done


def contact_sheet(shown: Sequence[Shown]) -> Image.Image:
    """The images side by side, each above its prompt, and the texts below."""
    images = [one for one in shown if one.image is not None]
    texts = [one for one in shown if one.image is None]
    width = MARGIN + len(images) * (TILE + MARGIN)
    font = ImageFont.load_default(FONT)
    columns = [_column(one, TILE, font) for one in images]
    rows = [line for one in texts for line in ["", *_column(one, width - 2 * MARGIN, font)]]
    below = MARGIN + TILE + MARGIN // 2
    height = below + LINE * (max(map(len, columns), default=0) + len(rows)) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for at, (one, lines) in enumerate(zip(images, columns, strict=True)):
        left = MARGIN + at * (TILE + MARGIN)
        assert one.image is not None, "they have images"
        with Image.open(one.image) as image:
            scale = TILE / max(image.size)
            tile = image.convert("RGB").resize(
                (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
            )
        sheet.paste(tile, (left, MARGIN))
        for row, line in enumerate(lines):
            draw.text((left, below + row * LINE), line, "black", font)
    top = below + LINE * max(map(len, columns), default=0)
    for row, line in enumerate(rows):
        draw.text((MARGIN, top + row * LINE), line, "black", font)
    return sheet


def _column(one: Shown, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Prompt and answer, in lines of at most ``width`` pixels."""
    letters = max(1, int(width / font.getlength("n")))
    lines = [
        f"{one.title}: {one.asked}",
        *([textwrap.shorten(one.answer, LONGEST, placeholder=" ...")] if one.answer else []),
    ]
    return [part for line in lines for part in textwrap.wrap(line, letters)]


def _resolve_image(args: argparse.Namespace, checkpoint: Path) -> None:
    """The server's own check of the images' size, steps and seed, before it is started for nothing."""
    from bagel_triton.model.config import CheckpointError
    from bagel_triton.protocol.errors import InvalidRequest
    from bagel_triton.protocol.request import TEXT2IMG, GenerationRequest
    from bagel_triton.protocol.validation import resolve_flow
    from bagel_triton.weights.files import CheckpointFiles

    try:
        config = CheckpointFiles(checkpoint).config
        max_side = config.latent.max_side
        usual = min(SIDE, config.drawn_side)
        args.height, args.width = (usual if side is None else side for side in (args.height, args.width))
        request = GenerationRequest(
            height=args.height, width=args.width, num_inference_steps=args.steps, seed=args.seed
        )
        resolve_flow(request, max_side, TEXT2IMG)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    except InvalidRequest as error:
        raise CommandError(f"--{error.message.replace('num_inference_steps', 'steps')}") from error


def _check_output(output: Path) -> None:
    if output.suffix.lower() != IMAGE_SUFFIX:
        raise CommandError(f"--output={output} is not allowed; the sheet is a PNG file, so its name ends in .png")
    folder = output.resolve().parent
    if not folder.is_dir():
        raise CommandError(f"--output={output}: {folder} is not a folder")
    if output.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        raise CommandError(f"--output={output} cannot be written")


def _show(line: str) -> None:
    print(line, end="", flush=True)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
