#!/usr/bin/env python3
"""Ask Triton itself for an image or an answer, over a gRPC stream, without the OpenAI proxy.

python triton_grpc_client.py --prompt "A cute cat" --server localhost:8001 --output cat.png
python triton_grpc_client.py --image cat.png --prompt "Make the cat stand up" --think
python triton_grpc_client.py --modality text --image cat.png --prompt "What is this?"
python triton_grpc_client.py --model bagel_text2img
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from common import grpc_address
from triton_task import Result, add_arguments, fail, generation_request, results, show, unwritable
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException

from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest
from bagel_triton.protocol.tensors import to_tensors

ENSEMBLE = "bagel_text2img"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    server = "Triton's gRPC port, HOST:PORT or a URL (default: %(default)s)"
    parser.add_argument("--server", "-s", type=grpc_address, default="localhost:8001", help=server)
    parser.add_argument("--model", default="bagel", choices=["bagel", ENSEMBLE], help="pipeline (default: %(default)s)")
    parser.add_argument("--image", "-i", type=Path, action="append", default=[], help="input image; may be repeated")
    args = parser.parse_args(argv)
    if args.model == ENSEMBLE:
        for option in ("modality", "image", "think", "max_think_tokens", "max_tokens"):
            if getattr(args, option):
                parser.error(f"--model {ENSEMBLE} takes no --{option.replace('_', '-')}")
    return args


def inputs(request: GenerationRequest) -> list[InferInput]:
    """Only what the request gives: every other input is optional and has its default."""
    return [
        InferInput(name, list(array.shape), REQUEST_FIELDS[name].datatype).set_data_from_numpy(array)
        for name, array in to_tensors(request).items()
    ]


def stream(server: str, model: str, request: GenerationRequest) -> Generator[InferResult]:
    """Responses of a decoupled model until its final flag; raises InferenceServerException."""
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with InferenceServerClient(server) as client:
        client.is_server_live()  # a stream to an address where nothing listens does not say so
        client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            client.async_stream_infer(model, inputs(request), enable_empty_final_response=True)
            while True:
                result, error = answers.get()
                if error is not None:
                    raise error
                response = result.get_response()
                if response.outputs:
                    yield result
                if response.parameters["triton_final_response"].bool_param:
                    return
        finally:
            client.stop_stream(cancel_requests=True)


def receive(args: argparse.Namespace, request: GenerationRequest) -> Iterator[Result]:
    with contextlib.closing(stream(args.server, args.model, request)) as responses:
        if args.model == ENSEMBLE:  # it has no events, so no progress
            for result in responses:
                yield result.as_numpy("generated_image"), int(result.as_numpy("used_seed")[0])
            return
        yield from results((answer.as_numpy("event")[0], answer.as_numpy("generated_image")) for answer in responses)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if reason := unwritable(args.output):
        return fail(reason)
    try:
        request = generation_request(args, [path.read_bytes() for path in args.image])
    except OSError as error:
        return fail(f"--image {error.filename}: {error.strerror}")
    try:
        found = list(receive(args, request))
        if not found:
            raise InferenceServerException("the reply is empty")
    except InferenceServerException as error:
        return fail(f"{args.model} at {args.server}: {error.message()}")
    except InvalidRequest as error:
        return fail(error.message)
    return show(found, args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
