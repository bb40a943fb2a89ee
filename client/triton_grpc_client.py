#!/usr/bin/env python3
"""Request an image or an answer from Triton itself, with its progress, over a gRPC stream and without the OpenAI proxy.

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
from typing import Any

import tritonclient.grpc as triton
from common import ProgressBar, grpc_address
from triton_task import ENSEMBLE, Result, inputs, parse_arguments, results, run

from bagel_triton.protocol.events import ProgressEvent, decode_event
from bagel_triton.protocol.request import GenerationRequest


def arguments(argv: list[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").splitlines()[0]
    return parse_arguments(argv, description, "bagel", "Triton's gRPC port", "localhost:8001", grpc_address)


def stream(client: Any, request: GenerationRequest) -> Generator[Any]:
    """The responses of ``bagel``, which is decoupled, until the final flag; raises InferenceServerException."""
    responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.is_server_live()  # a stream to an address where nothing listens raises nothing
    client.start_stream(lambda result, error: responses.put((result, error)))
    try:
        client.async_stream_infer("bagel", inputs(triton, request), enable_empty_final_response=True)
        while True:
            result, error = responses.get()
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return
    finally:
        client.stop_stream(cancel_requests=True)


def call(args: argparse.Namespace, request: GenerationRequest) -> Iterator[Result]:
    with triton.InferenceServerClient(args.server) as client:
        if args.model == ENSEMBLE:
            reply = client.infer(ENSEMBLE, inputs(triton, request))
            yield reply.as_numpy("generated_image"), int(reply.as_numpy("used_seed")[0])
            return
        with contextlib.closing(ProgressBar()) as bar, contextlib.closing(stream(client, request)) as responses:
            for response in responses:
                [encoded] = response.as_numpy("event")
                if isinstance(event := decode_event(encoded), ProgressEvent):
                    bar.show(event.stage, event.step, event.steps)
                yield from results([encoded], response.as_numpy("generated_image"))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return run(args, lambda request: call(args, request))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
