"""The request and the results of the Triton clients, for both protocols."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import print_any_text, without_login
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.events import AnswerEvent, ImageEvent, decode_event
from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest
from bagel_triton.protocol.tensors import to_tensors

ENSEMBLE = "bagel_text2img"
Result = AnswerEvent | tuple[NDArray[np.uint8], int]  # an answer or the thinking; an image [H, W, 3] and its seed


def parse_arguments(
    argv: list[str] | None, description: str, pipeline: str, port: str, server: str, address: Callable[[str], str]
) -> argparse.Namespace:
    """The arguments of a client of the model ``pipeline``; ``address`` reads that of the ``port``, ``server``."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    _add_task(parser)
    help_ = f"{port}, HOST:PORT or a URL (default: %(default)s)"
    parser.add_argument("--server", "-s", type=address, default=server, help=help_)
    models = [pipeline, ENSEMBLE]
    parser.add_argument("--model", default=pipeline, choices=models, help="pipeline (default: %(default)s)")
    args = parser.parse_args(argv)
    _check_model(parser, args)
    return args


def _add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", "-p", default="A cute cat", help="text prompt (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default="bagel_output.png", help="image (default: %(default)s)")
    parser.add_argument("--modality", "-m", choices=["image", "text"], help="what to make (default: image)")
    parser.add_argument("--image", "-i", type=Path, action="append", default=[], help="input image; may be repeated")
    parser.add_argument("--height", type=int, help="height in pixels")
    parser.add_argument("--width", type=int, help="width in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--cache", help="taylorseer skips some of the steps: faster, and another image")
    parser.add_argument("--seed", type=int, help="random seed; drawn where none is given")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--think", action="store_true", help="think before the image or the answer")
    parser.add_argument("--max-think-tokens", type=int, help="longest thinking in tokens")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens")


def _check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse the arguments that the ensemble, which only makes images from text, has no input for."""
    for option in ("modality", "image", "think", "max_think_tokens", "max_tokens"):
        if args.model == ENSEMBLE and getattr(args, option):
            parser.error(f"--model {ENSEMBLE} takes no --{option.replace('_', '-')}")


def generation_request(args: argparse.Namespace) -> GenerationRequest:
    """The request of ``args``; fields that are not given have the server's defaults.

    Raises:
        OSError: an image cannot be read.
    """
    return GenerationRequest(
        prompt=args.prompt,
        image=tuple(path.read_bytes() for path in args.image) or None,
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


def inputs(protocol: Any, request: GenerationRequest) -> list[Any]:
    """The given fields of ``request`` as inputs for ``protocol``, tritonclient.grpc or tritonclient.http.

    Raises:
        InvalidRequest: a value that its tensor cannot hold.
    """
    return [
        protocol.InferInput(name, list(array.shape), REQUEST_FIELDS[name].datatype).set_data_from_numpy(array)
        for name, array in to_tensors(request).items()
    ]


def results(events: Iterable[bytes], pixels: NDArray[np.uint8] | None) -> Iterator[Result]:
    """The answers and images of ``events``; ``pixels`` are those of the images, below each other."""
    top = 0
    for event in map(decode_event, events):
        if isinstance(event, AnswerEvent):
            yield event
        elif isinstance(event, ImageEvent) and pixels is not None:
            yield pixels[top : top + event.height], event.seed
            top += event.height


def unwritable(output: Path) -> str | None:
    """The reason why no image can be written to ``output``, as far as it is known before there is an image."""
    if not output.parent.is_dir():
        return f"cannot write {output}: {output.parent} is not a folder"
    if output.suffix.lower() not in Image.registered_extensions():
        return f"cannot write {output}: its name has no ending of an image, such as .png"
    return None


def run(args: argparse.Namespace, call: Callable[[GenerationRequest], Iterable[Result]]) -> int:
    """Send the request of ``args`` by ``call``, print texts and save the image; the exit status."""
    print_any_text()
    if reason := unwritable(args.output):
        return fail(reason)
    try:
        request = generation_request(args)
    except OSError as error:
        return fail(f"--image {error.filename}: {error.strerror}")
    try:
        found = list(call(request))
    except InvalidRequest as error:
        return fail(error.message)
    except (InferenceServerException, OSError) as error:  # OSError: over HTTP, a server that is not there
        message = error.message() if isinstance(error, InferenceServerException) else error
        return fail(f"{args.model} at {without_login(args.server)}: {message}")
    status = 0
    for result in found:
        if isinstance(result, AnswerEvent):
            if result.reasoning:
                print(f"thinking:\n{result.reasoning}", file=sys.stderr)
            if args.modality == "text":
                print(result.content)
        else:
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
