#!/usr/bin/env python3
"""Ask Triton itself for an image or an answer, over HTTP ``generate_stream``, without the OpenAI proxy.

    python triton_http_client.py --prompt "A cute cat" --server http://localhost:8000
    python triton_http_client.py --modality text --prompt "What is the capital of France?"

The same by hand, one JSON object per event:

    curl -N localhost:8000/v2/models/bagel/generate_stream -d '{"prompt": "A cute cat", "seed": 42}'

Input images are bytes, which this protocol's JSON cannot carry: triton_grpc_client.py sends them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
from common import http_url, without_login
from triton_task import add_arguments, fail, generation_request, results, show, unwritable

from bagel_triton.protocol.errors import InvalidRequest
from bagel_triton.protocol.tensors import to_tensors

TIMEOUT = httpx.Timeout(600, connect=10)


class Refused(Exception):
    """The request did not lead to a reply; the message says why."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    server = "Triton's HTTP port, HOST:PORT or a URL (default: %(default)s)"
    parser.add_argument("--server", "-s", type=http_url, default="http://localhost:8000", help=server)
    return parser.parse_args(argv)


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments ask for; raises InvalidRequest for what Triton would wrap or garble."""
    request = generation_request(args)
    to_tensors(request)
    return {name: value for name, value in msgspec.structs.asdict(request).items() if value is not None}


def responses(server: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The output tensors of each response, flat, as JSON; raises Refused on an error."""
    url = f"{server}/v2/models/bagel/generate_stream"
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


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if reason := unwritable(args.output):
        return fail(reason)
    try:
        answers = responses(args.server, request_body(args))
        found = list(results((answer["event"], answer.get("generated_image")) for answer in answers))
        if not found:
            raise Refused("the reply is empty")
    except InvalidRequest as error:
        return fail(error.message)
    except (Refused, httpx.HTTPError, httpx.InvalidURL) as error:
        return fail(f"bagel at {without_login(args.server)}: {error}")
    return show(found, args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
