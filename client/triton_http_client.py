#!/usr/bin/env python3
"""Ask Triton itself for a picture or an answer, over HTTP ``generate_stream``, without the OpenAI proxy.

    python triton_http_client.py --prompt "A cute cat" --server http://localhost:8000
    python triton_http_client.py --modality text --prompt "What is the capital of France?"

The same by hand, one JSON object per event:

    curl -N localhost:8000/v2/models/bagel/generate_stream -d '{"prompt": "A cute cat", "seed": 42}'

Input pictures are bytes, which this protocol's JSON cannot carry: triton_grpc_client.py sends them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from picture_file import fail, save, unwritable
from tqdm import tqdm

from bagel_triton.errors import InvalidRequest
from bagel_triton.events import AnswerEvent, PictureEvent, ProgressEvent, decode_event
from bagel_triton.request import GenerationRequest, to_tensors

TIMEOUT = httpx.Timeout(600, connect=10)


class Refused(Exception):
    """The request did not lead to a reply; the message says why."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", "-p", default="A cute cat", help="text prompt (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default="bagel_output.png", help="picture (default: %(default)s)")
    parser.add_argument("--server", "-s", default="http://localhost:8000", help="Triton's URL (default: %(default)s)")
    parser.add_argument(
        "--modality", "-m", default="image", choices=["image", "text"], help="what to make (default: %(default)s)"
    )
    parser.add_argument("--height", type=int, help="height in pixels")
    parser.add_argument("--width", type=int, help="width in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--seed", type=int, help="random seed; drawn where none is given")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--think", action="store_true", help="think before the picture or the answer")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens")
    return parser.parse_args(argv)


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments ask for; raises InvalidRequest for what Triton would wrap or garble."""
    fields = {
        "prompt": args.prompt,
        "modality": args.modality,
        "negative_prompt": args.negative,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "think": args.think or None,
        "max_tokens": args.max_tokens,
    }
    to_tensors(GenerationRequest(**fields))
    return {name: value for name, value in fields.items() if value is not None}


def responses(server: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The output tensors of each response, flat, as JSON; raises Refused on an error."""
    url = f"{server.rstrip('/')}/v2/models/bagel/generate_stream"
    # Triton is on this host or network: http_proxy of the environment is not for it.
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT, trust_env=False) as answer:
        for line in answer.iter_lines():
            # An error that comes before the first response is plain JSON.
            text = line.removeprefix("data: ")
            if not text:
                continue
            try:
                outputs = json.loads(text)
            except ValueError as error:
                raise Refused(f"this is no Triton: it answered {text[:100]!r}") from error
            if "error" in outputs:
                raise Refused(outputs["error"])
            yield outputs


def receive(args: argparse.Namespace, body: dict[str, Any]) -> Iterator[AnswerEvent | tuple[NDArray[np.uint8], int]]:
    """The answer or the thinking, and the picture [H, W, 3] with its seed."""
    with tqdm(desc="bagel", unit="step", leave=False) as bar:
        for outputs in responses(args.server, body):
            event = decode_event(outputs["event"])
            if isinstance(event, ProgressEvent):
                bar.total, bar.n = event.steps, event.step
                bar.refresh()
            elif isinstance(event, AnswerEvent):
                yield event
            elif isinstance(event, PictureEvent):
                pixels = np.array(outputs["generated_image"], dtype=np.uint8)
                yield pixels.reshape(event.height, event.width, 3), event.seed


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if reason := unwritable(args.output):
        return fail(reason)
    try:
        body = request_body(args)
        results = list(receive(args, body))
        if not results:
            raise Refused("the reply is empty")
    except InvalidRequest as error:
        return fail(error.message)
    except (Refused, httpx.HTTPError, httpx.InvalidURL) as error:
        return fail(f"bagel at {args.server}: {error}")
    status = 0
    for result in results:
        if isinstance(result, AnswerEvent):
            if result.reasoning:
                print(f"thinking:\n{result.reasoning}", file=sys.stderr)
            if args.modality == "text":
                print(result.content)
            continue
        status = status or save(*result, args.output)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
