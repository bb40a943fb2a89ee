"""What the Triton clients request and how they show the result, whatever the protocol."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from common import ProgressBar
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from bagel_triton.protocol.events import AnswerEvent, ImageEvent, ProgressEvent, decode_event
from bagel_triton.protocol.request import GenerationRequest

Result = AnswerEvent | tuple[NDArray[np.uint8], int]  # an answer or the thinking; an image [H, W, 3] and its seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", "-p", default="A cute cat", help="text prompt (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default="bagel_output.png", help="image (default: %(default)s)")
    parser.add_argument("--modality", "-m", choices=["image", "text"], help="what to make (default: image)")
    parser.add_argument("--height", type=int, help="height in pixels")
    parser.add_argument("--width", type=int, help="width in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--cache", help="taylorseer skips some of the steps: faster, and another image")
    parser.add_argument("--seed", type=int, help="random seed; drawn where none is given")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--think", action="store_true", help="think before the image or the answer")
    parser.add_argument("--max-think-tokens", type=int, help="longest thinking in tokens")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens")


def generation_request(args: argparse.Namespace, images: Iterable[bytes] = ()) -> GenerationRequest:
    """The request of ``args`` with encoded ``images``; fields that are not given have the server's defaults."""
    return GenerationRequest(
        prompt=args.prompt,
        image=tuple(images) or None,
        modality=args.modality,
        negative_prompt=args.negative,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        cache=args.cache,
        seed=args.seed,
        think=args.think or None,
        max_think_tokens=args.max_think_tokens,
        max_tokens=args.max_tokens,
    )


def results(responses: Iterable[tuple[str | bytes, ArrayLike | None]]) -> Iterator[Result]:
    """The results in ``responses``, each an encoded event and the pixels beside it, if any; shows the progress."""
    with contextlib.closing(ProgressBar()) as bar:
        for encoded, pixels in responses:
            event = decode_event(encoded)
            if isinstance(event, ProgressEvent):
                bar.show(event.stage, event.step, event.steps)
            elif isinstance(event, AnswerEvent):
                yield event
            elif isinstance(event, ImageEvent):
                yield np.asarray(pixels, dtype=np.uint8).reshape(event.height, event.width, 3), event.seed


def unwritable(output: Path) -> str | None:
    """The reason why no image can be written to ``output``, as far as it is known before there is an image."""
    if not output.parent.is_dir():
        return f"cannot write {output}: {output.parent} is not a folder"
    if output.suffix.lower() not in Image.registered_extensions():
        return f"cannot write {output}: its name has no ending of an image, such as .png"
    return None


def show(found: Iterable[Result], args: argparse.Namespace) -> int:
    """Print texts and save the image; the exit status."""
    status = 0
    for result in found:
        if isinstance(result, AnswerEvent):
            if result.reasoning:
                print(f"thinking:\n{result.reasoning}", file=sys.stderr)
            if args.modality == "text":
                print(result.content)
            continue
        status = status or save(*result, args.output)
    return status


def save(pixels: NDArray[np.uint8], seed: int, output: Path) -> int:
    """Write the image and print its path; the exit status."""
    try:
        Image.fromarray(pixels).save(output)
    except (OSError, ValueError) as error:  # ValueError: a format that cannot be written
        return fail(f"cannot write {output}: {getattr(error, 'strerror', None) or error}")
    print(f"image  {output}, {pixels.shape[1]}x{pixels.shape[0]} pixels, seed {seed}")
    return 0


def fail(message: str) -> int:
    """Print an error; the exit status."""
    print(message, file=sys.stderr)
    return 1
