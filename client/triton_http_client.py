#!/usr/bin/env python3
"""Request an image or an answer from Triton itself: one ``infer`` call over HTTP, without the OpenAI proxy.

    python triton_http_client.py --prompt "A cute cat" --server http://localhost:8000
    python triton_http_client.py --modality text --image cat.png --prompt "What is this?"
    python triton_http_client.py --model bagel_text2img

With curl the answer is JSON; ``generate_stream`` of the model ``bagel`` adds the progress:

    curl -N localhost:8000/v2/models/bagel/generate_stream -d '{"prompt": "A cute cat", "seed": 42}'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import tritonclient.http as triton
from common import http_url
from triton_task import ENSEMBLE, Result, inputs, parse_arguments, results, run

from bagel_triton.protocol.request import GenerationRequest

TIMEOUT_S = 600
CONNECT_S = 10


def arguments(argv: list[str] | None) -> argparse.Namespace:
    description = (__doc__ or "").splitlines()[0]
    return parse_arguments(argv, description, "bagel_infer", "Triton's HTTP port", "http://localhost:8000", http_url)


def call(args: argparse.Namespace, request: GenerationRequest) -> Iterator[Result]:
    scheme, _, address = args.server.partition("://")
    times = {"connection_timeout": CONNECT_S, "network_timeout": TIMEOUT_S}
    with triton.InferenceServerClient(address, ssl=scheme == "https", **times) as client:
        reply = client.infer(args.model, inputs(triton, request))
    pixels = reply.as_numpy("generated_image")
    if args.model == ENSEMBLE:
        yield pixels, int(reply.as_numpy("used_seed")[0])
    else:
        yield from results(reply.as_numpy("event"), pixels)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return run(args, lambda request: call(args, request))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
