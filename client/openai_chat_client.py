#!/usr/bin/env python3
"""Ask a BAGEL server for images or text over its OpenAI chat API.

Needs httpx, tqdm and the files beside it, nothing of the server's. Images are saved; text is printed
on standard output as it comes, thinking and progress on standard error.

    python openai_chat_client.py --prompt "A cute cat" --output cat.png
    python openai_chat_client.py -m img2img -i cat.png -p "Make the cat stand up" --think --negative "blurry"
    python openai_chat_client.py -m img2text -i https://example.com/cat.png -p "What is this?"
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from screen import Screen
from server_address import http_url, without_login

TIMEOUT = httpx.Timeout(600, connect=10)
OUTPUT_OF = {"text2img": "image", "img2img": "image", "img2text": "text", "text2text": "text"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # which no proxy of the environment can reach
SIDE = 512
STEPS = 25


class Refused(Exception):
    """The request did not lead to a reply; the message says why."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", "-p", default="A cute cat", help="text prompt (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default="bagel_output.png", help="image (default: %(default)s)")
    server = "URL or HOST:PORT (default: %(default)s)"
    parser.add_argument("--server", "-s", type=http_url, default="http://localhost:8091", help=server)
    parser.add_argument("--image-url", "-i", action="append", default=[], help="a URL or a local file; repeatable")
    parser.add_argument("--modality", "-m", default="text2img", choices=OUTPUT_OF, help="task (default: %(default)s)")
    sides = f"in pixels (default: {SIDE} for text2img, that of the resized input image for img2img)"
    parser.add_argument("--height", type=int, help=f"height {sides}")
    parser.add_argument("--width", type=int, help=f"width {sides}")
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: {STEPS})")
    parser.add_argument("--cache", help="taylorseer skips some of the steps: faster, and another image")
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--think", action="store_true", help="think before the image or the answer")
    parser.add_argument("--max-think-tokens", type=int, help="longest thinking in tokens")
    parser.add_argument("--n", type=int, help="number of images, saved as NAME-1, NAME-2, or of sampled answers")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, help="sample the text; greedy without it")
    args = parser.parse_args(argv)
    takes_image = args.modality.startswith("img2")
    if takes_image != bool(args.image_url):
        parser.error(f"--modality {args.modality} {'needs' if takes_image else 'takes no'} --image-url")
    return args


def image_url(source: str) -> str:
    """``source`` if it is a URL; the contents of the local file it names as a data URL otherwise."""
    if source.startswith(("http://", "https://", "data:")):
        return source
    mime, _ = mimetypes.guess_type(source)
    if mime is None or not mime.startswith("image/"):
        raise Refused(f"--image-url {source}: not a URL, and not the name of an image file")
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise Refused(f"--image-url {source}: {error.strerror}") from error
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": f"<|im_start|>{args.prompt}<|im_end|>"}]
    content += [{"type": "image_url", "image_url": {"url": image_url(source)}} for source in args.image_url]
    output = OUTPUT_OF[args.modality]
    defaults = {"num_inference_steps": STEPS} if output == "image" else {}
    if args.modality == "text2img":  # an edited image keeps its size
        defaults |= {"height": SIDE, "width": SIDE}
    given = {
        "height": args.height,
        "width": args.width,
        "num_inference_steps": args.steps,
        "cache": args.cache,
        "negative_prompt": args.negative or None,
        "think": args.think or None,
        "max_think_tokens": args.max_think_tokens,
        "n": args.n,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
    }
    return {
        "messages": [{"role": "user", "content": content}],
        "modalities": [output],
        "seed": args.seed,
        "stream": True,
        **defaults,
        # The server refuses what has no meaning for the task, so only what was given is sent.
        **{name: value for name, value in given.items() if value is not None},
    }


def chunks(server: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of the streamed reply; raises Refused when the server says no."""
    url = httpx.URL(f"{server}/v1/chat/completions")
    with (
        httpx.Client(timeout=TIMEOUT, trust_env=url.host not in LOOPBACK) as client,
        # Written so, NaN and half a character too get to the server, which says what is wrong with them.
        client.stream("POST", url, content=json.dumps(body), headers={"Content-Type": "application/json"}) as response,
    ):
        if response.status_code != 200:
            raise Refused(f"the server said no ({response.status_code}): {reason(response.read())}")
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise Refused(f"the server gave up: {chunk['error']['message']}")
            yield chunk
    raise Refused("the server closed the connection before the reply was complete")


def reason(answer: bytes) -> str:
    """The message in OpenAI's error shape, or whatever else came instead."""
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return answer.decode(errors="replace").strip()[:200]


def receive(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The images, and the last chunk, which has the seed and the timings."""
    images: list[dict[str, Any]] = []
    chunk: dict[str, Any] = {}
    screen = Screen(several=OUTPUT_OF[args.modality] == "text" and (args.n or 1) > 1)
    try:
        for chunk in chunks(args.server, request_body(args)):
            if progress := chunk.get("progress"):
                screen.progress(**progress)
            for choice in chunk["choices"]:
                delta, index = choice["delta"], choice["index"]
                if thought := delta.get("reasoning_content"):
                    screen.text(index, "thinking", thought)
                content = delta.get("content")
                if isinstance(content, list):
                    images += content
                elif content:
                    screen.text(index, "answer", content)
                if choice["finish_reason"] == "length":
                    screen.text(index, "note", "the answer was cut at the token limit")
    finally:
        screen.close()
    if not images and OUTPUT_OF[args.modality] == "image":
        raise Refused("the server sent no image")
    return images, chunk


def save(output: Path, images: list[dict[str, Any]]) -> None:
    """Write the images and say where; raises Refused where that cannot be."""
    for number, image in enumerate(images, 1):
        path = output.with_stem(f"{output.stem}-{number}") if len(images) > 1 else output
        png = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        try:
            path.write_bytes(png)
        except OSError as error:
            raise Refused(f"cannot write {path}: {error.strerror}") from error
        width, height = struct.unpack(">II", png[16:24])
        print(f"image  {path}, {width}x{height} pixels, {len(png) / 1024:.1f} KB, seed {image['seed']}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if not args.output.parent.is_dir():
            raise Refused(f"cannot write {args.output}: {args.output.parent} is not a folder")
        images, last = receive(args)
        save(args.output, images)
    except (Refused, httpx.InvalidURL, httpx.HTTPError) as error:
        server = without_login(args.server)
        print(f"no answer from {server}: {error}" if isinstance(error, httpx.HTTPError) else error, file=sys.stderr)
        return 1
    out = sys.stdout if images else sys.stderr  # only the text goes where text is wanted
    print(f"seed     {'none, greedy' if last['seed'] is None else last['seed']}", file=out)
    for stage, spent in last["metrics"]["stages"].items():
        print(f"{stage:<12} {spent['run_s']:8.3f} s  (queued {spent['queue_s']:.3f} s)", file=out)
    print(f"{'total':<12} {last['metrics']['total_s']:8.3f} s", file=out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
