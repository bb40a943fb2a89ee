#!/usr/bin/env python3
"""Send one request to a BAGEL server's OpenAI chat API and show the reply as it comes.

Needs httpx, tqdm and common.py beside it, and nothing of the server's. Images are saved. Text goes to
standard output; thinking, progress and timings of a text go to standard error.

    python openai_chat_client.py --prompt "A cute cat" --output cat.png
    python openai_chat_client.py -m img2img -i cat.png -p "Make the cat stand up" --think --negative "blurry"
    python openai_chat_client.py -m img2text -i https://example.com/cat.png -p "What is this?"
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from common import ProgressBar, http_url, print_any_text, without_login

TIMEOUT = httpx.Timeout(600, connect=10)
OUTPUT_OF = {"text2img": "image", "img2img": "image", "img2text": "text", "text2text": "text"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # no proxy of the environment can reach it
API_KEY = "BAGEL_API_KEY"
STEPS = 25
# The first bytes of an image file, by its media type. The server itself takes more formats and reads the content alone.
SIGNATURES = re.compile(
    rb"(?P<png>\x89PNG)|(?P<jpeg>\xff\xd8\xff)|(?P<webp>RIFF....WEBP)|(?P<gif>GIF8)|(?P<bmp>BM)|(?P<tiff>II\*\0|MM\0\*)",
    re.DOTALL,
)
PORT_HINT = "is this the port of the OpenAI API? It is 8091 by default; 8000, 8001 and 8002 are Triton's own"


class RequestFailed(Exception):
    """There is no reply; the message has the reason."""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--prompt", "-p", default="A cute cat", help="text prompt (default: %(default)s)")
    output = "the image's file; several are NAME-1, NAME-2, ... (default: %(default)s)"
    parser.add_argument("--output", "-o", type=Path, default="bagel_output.png", help=output)
    server = "URL or HOST:PORT (default: %(default)s)"
    parser.add_argument("--server", "-s", type=http_url, default="http://localhost:8091", help=server)
    parser.add_argument("--image-url", "-i", action="append", default=[], help="a URL or a local file; repeatable")
    parser.add_argument("--modality", "-m", default="text2img", choices=OUTPUT_OF, help="task (default: %(default)s)")
    sides = "in pixels (default: the server's, 512 or less; with an input image, that of the resized image)"
    parser.add_argument("--height", type=int, help=f"height {sides}")
    parser.add_argument("--width", type=int, help=f"width {sides}")
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: {STEPS})")
    parser.add_argument("--cache", help="taylorseer skips some of the steps: faster, and another image")
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument("--negative", help="negative prompt")
    parser.add_argument("--think", action="store_true", help="think before the image or the answer")
    parser.add_argument("--max-think-tokens", type=int, help="longest thinking in tokens")
    parser.add_argument("--n", type=int, help="number of images, or of sampled answers")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens")
    parser.add_argument("--temperature", type=float, help="sample the text; greedy without it")
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get(API_KEY), help=f"default: ${API_KEY}")
    stream = "show progress and text as they come (default: --stream)"
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help=stream)
    args = parser.parse_args(argv)
    if args.modality.startswith("img2") and not args.image_url:
        parser.error(f"--modality {args.modality} needs --image-url")
    return args


def image_url(source: str) -> str:
    """``source`` if it is a URL, else the local file of that name as a data URL, whatever the file is called."""
    if source.startswith(("http://", "https://", "data:")):
        return source
    try:
        data = Path(source).read_bytes()
    except OSError as error:
        raise RequestFailed(f"--image-url {source}: not a URL, and as a file: {error.strerror}") from error
    found = SIGNATURES.match(data)
    media_type = f"image/{found.lastgroup}" if found else "application/octet-stream"
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def request_body(args: argparse.Namespace) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": args.prompt}]
    content += [{"type": "image_url", "image_url": {"url": image_url(source)}} for source in args.image_url]
    output = OUTPUT_OF[args.modality]
    defaults = {"num_inference_steps": STEPS} if output == "image" else {}
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
        "stream": args.stream or None,
        "stream_options": {"include_progress": True} if args.stream else None,
    }
    return {
        "messages": [{"role": "user", "content": content}],
        "modalities": [output],
        "seed": args.seed,
        **defaults,
        **{name: value for name, value in given.items() if value is not None},
    }


@contextmanager
def sent(args: argparse.Namespace) -> Iterator[httpx.Response]:
    """The response to the request; raises RequestFailed for any status but 200."""
    url = httpx.URL(f"{args.server.removesuffix('/v1')}/v1/chat/completions")
    headers = {"Content-Type": "application/json"}
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    # json.dumps writes NaN and lone surrogates, so that the server's own message names what is wrong with them.
    body = json.dumps(request_body(args))
    with (
        httpx.Client(timeout=TIMEOUT, trust_env=url.host not in LOOPBACK) as client,
        client.stream("POST", url, content=body, headers=headers) as response,
    ):
        if response.status_code != 200:
            message = error_message(response.read(), response.status_code)
            raise RequestFailed(f"the server refused the request ({response.status_code}): {message}")
        yield response


def error_message(answer: bytes, status: int) -> str:
    """The message in OpenAI's error shape; of another server, the beginning of its answer and a hint."""
    try:
        message = str(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        text = answer.decode(errors="replace").strip()[:200]
        return f"{text}; {PORT_HINT}" if text else PORT_HINT
    return f"{message}; --api-key gives one" if status == 401 else message


def chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed reply; raises RequestFailed where it ends with an error or too early."""
    try:
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            chunk: dict[str, Any] = json.loads(data)
            if "error" in chunk:
                raise RequestFailed(f"the server gave up: {chunk['error']['message']}")
            yield chunk
    except httpx.TimeoutException as error:
        raise RequestFailed(f"the server sent nothing for {TIMEOUT.read:.0f} s") from error
    except httpx.HTTPError:
        pass
    raise RequestFailed("the connection ended before the reply was complete")


def whole(response: httpx.Response) -> dict[str, Any]:
    """A reply that is not streamed, as one chunk of a stream."""
    reply: dict[str, Any] = json.loads(response.read())
    return {**reply, "choices": [{**choice, "delta": choice["message"]} for choice in reply["choices"]]}


class Screen:
    """Shows a reply: answers on standard output, everything else on standard error.

    One answer is shown as it comes. Several arrive interleaved, so they are shown at the end.
    """

    def __init__(self, several: bool) -> None:
        self._several = several
        self._waiting: list[tuple[int, str, str]] = []
        self._heading = ""
        self._out = sys.stdout
        self._end = ""  # the last character on the current line
        self._bar = ProgressBar()

    def text(self, choice: int, heading: str, piece: str) -> None:
        if self._several:
            self._waiting.append((choice, f"{heading} {choice + 1}", piece))
        else:
            self._show(heading, piece)

    def progress(self, stage: str, step: int, steps: int) -> None:
        self._end_line()
        self._bar.show(stage, step, steps)

    def close(self) -> None:
        self._bar.close()
        for _, heading, piece in sorted(self._waiting, key=lambda waiting: waiting[0]):
            self._show(heading, piece)
        self._end_line()

    def _show(self, heading: str, piece: str) -> None:
        self._bar.close()
        if heading != self._heading:
            self._end_line()
            self._heading = heading
            self._out = sys.stdout if heading.startswith("answer") else sys.stderr
            if heading != "answer":
                print(f"{heading}:", file=self._out)
        self._out.write(piece)
        self._out.flush()
        self._end = piece[-1]

    def _end_line(self) -> None:
        if self._end not in ("", "\n"):
            print(file=self._out, flush=True)
        self._end = ""


def receive(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The images, and the seed and metrics of the reply."""
    images: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    wants_image = OUTPUT_OF[args.modality] == "image"
    screen = Screen(several=not wants_image and (args.n or 1) > 1)
    try:
        with sent(args) as response:
            for chunk in chunks(response) if args.stream else [whole(response)]:
                facts |= {name: chunk[name] for name in ("seed", "metrics") if name in chunk}
                if progress := chunk.get("progress"):
                    screen.progress(**progress)
                for choice in chunk["choices"]:
                    images += show(choice, screen)
    finally:
        screen.close()
    if wants_image and not images:
        raise RequestFailed("the server sent no image")
    return images, facts


def show(choice: dict[str, Any], screen: Screen) -> list[dict[str, Any]]:
    """Show the text of a chunk's choice; its images."""
    delta, index = choice["delta"], choice["index"]
    content = delta.get("content")
    if thought := delta.get("reasoning_content"):
        screen.text(index, "thinking", thought)
    if isinstance(content, str) and content:
        screen.text(index, "answer", content)
    if choice["finish_reason"] == "length":
        screen.text(index, "note", "the answer was cut at the token limit")
    found = delta.get("images") or (content if isinstance(content, list) else [])
    return [image for image in found if image.get("type") == "image_url"]


def save(output: Path, images: list[dict[str, Any]], seed: int) -> None:
    """Write the images and print their paths; raises RequestFailed where that is not possible."""
    for index, image in enumerate(images):
        path = output.with_stem(f"{output.stem}-{index + 1}") if len(images) > 1 else output
        try:
            png = base64.b64decode(image["image_url"]["url"].partition(",")[2], validate=True)
            path.write_bytes(png)
        except OSError as error:
            raise RequestFailed(f"cannot write {path}: {error.strerror}") from error
        except binascii.Error as error:
            raise RequestFailed(f"the server sent an image that is not base64: {error}") from error
        width, height = (int.from_bytes(png[start : start + 4]) for start in (16, 20))  # of PNG's first chunk
        of_image = image.get("seed", seed + index)
        print(f"image  {path}, {width}x{height} pixels, {len(png) / 1024:.1f} KB, seed {of_image}")


def summary(facts: dict[str, Any]) -> Iterable[str]:
    """The seed and the stages' times, a line each."""
    yield f"seed     {'none, greedy' if facts['seed'] is None else facts['seed']}"
    for stage, spent in facts["metrics"]["stages"].items():
        yield f"{stage:<12} {spent['run_s']:8.3f} s  (queued {spent['queue_s']:.3f} s)"
    yield f"{'total':<12} {facts['metrics']['total_s']:8.3f} s"


def main(argv: list[str] | None = None) -> int:
    print_any_text()
    args = arguments(argv)
    try:
        if not args.output.parent.is_dir():
            raise RequestFailed(f"cannot write {args.output}: {args.output.parent} is not a folder")
        images, facts = receive(args)
        save(args.output, images, facts["seed"] or 0)
    except RequestFailed as error:
        print(error, file=sys.stderr)
        return 1
    except (httpx.InvalidURL, httpx.HTTPError) as error:
        elsewhere = isinstance(error, (httpx.ConnectError, httpx.RemoteProtocolError))
        hint = f"; {PORT_HINT}" if elsewhere else ""
        print(f"no answer from {without_login(args.server)}: {error}{hint}", file=sys.stderr)
        return 1
    for line in summary(facts):
        print(line, file=sys.stdout if images else sys.stderr)  # standard output has only the text, where it is wanted
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
