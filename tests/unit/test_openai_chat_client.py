from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from proxy_fake import (
    ONE_ANSWER,
    PIXELS,
    PROGRESS,
    SETTINGS,
    THOUGHT_IMAGES,
    TWO_ANSWERS,
    FakeClient,
    live_proxy,
    user_turn,
)

from bagel_triton.openai.settings import HttpOptions
from bagel_triton.protocol.errors import InvalidRequest, Overloaded
from bagel_triton.protocol.request import GenerationRequest

SCRIPT = Path(__file__).parents[2] / "client" / "openai_chat_client.py"


def run_client(*args: str, cwd: Path, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    # The client must run without the server's package.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=60, check=False
    )


def on_a_terminal(*args: str, cwd: Path) -> str:
    """What the client shows where its standard error is a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            run_client(*args, cwd=cwd, stderr=its)
        finally:
            os.close(its)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal that has no writer left
            while piece := screen.read(4096):
                shown += piece
    return shown.decode()


def test_it_saves_the_image_and_says_where_and_how_long(tmp_path: Path) -> None:
    backend = FakeClient()
    with live_proxy(backend) as url:
        done = run_client("-s", url, "-p", "A dog", "--negative", "blurry", "--steps", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "bagel_output.png")), PIXELS)
    for shown in (
        "bagel_output.png, 48x32 pixels",
        "seed 7",
        "seed     7",
        "thinker",
        "0.500 s  (queued 0.250 s)",
        "total",
    ):
        assert shown in done.stdout
    assert done.stderr == ""
    assert backend.requests == [
        GenerationRequest(
            messages=(user_turn("A dog"),),
            modality="image",
            negative_prompt="blurry",
            num_inference_steps=4,
            seed=42,
        )
    ]


def test_progress_is_a_bar_on_a_terminal_and_taken_away_at_the_end(tmp_path: Path) -> None:
    with live_proxy(FakeClient()) as url:
        shown = on_a_terminal("-s", url, cwd=tmp_path)
    assert "3/3" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")


def test_a_refusal_has_no_bar_before_it(tmp_path: Path) -> None:
    with live_proxy(FakeClient(InvalidRequest("no"))) as url:
        assert on_a_terminal("-s", url, cwd=tmp_path) == "the server refused the request (400): no\r\n"


def test_a_server_may_be_named_by_host_and_port(tmp_path: Path) -> None:
    with live_proxy(FakeClient()) as url:
        done = run_client("-s", url.removeprefix("http://"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_bounds_of_thinking_and_skipped_steps_are_asked_for(tmp_path: Path) -> None:
    backend = FakeClient(*THOUGHT_IMAGES)
    with live_proxy(backend) as url:
        run_client("-s", url, "--think", "--max-think-tokens", "9", "--cache", "taylorseer", cwd=tmp_path)
    [request] = backend.requests
    assert (request.think, request.max_think_tokens, request.cache) == (True, 9, "taylorseer")


def test_text_is_printed_and_only_text_goes_to_standard_output(tmp_path: Path) -> None:
    backend = FakeClient(*ONE_ANSWER)
    with live_proxy(backend) as url:
        done = run_client("-s", url, "-m", "text2text", "-p", "Where?", "--max-tokens", "9", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Paris\n")
    assert "thinker" in done.stderr
    turn = user_turn("Where?")
    assert backend.requests == [GenerationRequest(messages=(turn,), modality="text", seed=42, max_tokens=9)]
    assert not list(tmp_path.iterdir())


def test_thinking_is_shown_apart_from_each_answer(tmp_path: Path) -> None:
    backend = FakeClient(*TWO_ANSWERS)
    with live_proxy(backend) as url:
        options = ("--think", "--n", "2", "--temperature", "0.5")
        done = run_client("-s", url, "-m", "text2text", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "answer 1:\nParis.\nanswer 2:\nIt is Lyon\n"
    assert done.stderr.startswith("thinking 1:\nLet me see.\nnote 2:\nthe answer was cut at the token limit\n")
    request = backend.requests[0]
    assert (request.think, request.n, request.temperature) == (True, 2, 0.5)


def test_thinking_streams_before_its_answer(tmp_path: Path) -> None:
    script = [item for item in TWO_ANSWERS if getattr(item.event, "index", 0) == 0]
    with live_proxy(FakeClient(*script)) as url:
        done = run_client("-s", url, "-m", "text2text", "--think", cwd=tmp_path)
    assert done.stdout == "Paris.\n"
    assert done.stderr.startswith("thinking:\nLet me see.\nseed     11\n")


def test_every_image_is_saved_and_its_thinking_shown(tmp_path: Path) -> None:
    with live_proxy(FakeClient(*THOUGHT_IMAGES)) as url:
        done = run_client("-s", url, "-o", "cat.png", "--think", "--n", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "cat-1.png")), PIXELS)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "cat-2.png")), PIXELS[::-1])
    assert done.stderr.startswith("thinking:\nA cat, in snow.\n")
    for shown in ("cat-1.png, 48x32 pixels", "seed 7", "cat-2.png, 48x32 pixels", "seed 8"):
        assert shown in done.stdout


def test_images_are_read_here_and_an_edit_keeps_its_size(tmp_path: Path) -> None:
    backend = FakeClient()
    Image.fromarray(PIXELS).save(tmp_path / "upload.tmp", format="JPEG")
    Image.fromarray(PIXELS).save(tmp_path / "dog.png")
    with live_proxy(backend) as url:
        run_client("-s", url, "-m", "img2img", "-i", "upload.tmp", "-i", "dog.png", cwd=tmp_path)
        run_client("-s", url, "-m", "img2img", "-i", "dog.png", "--width", "64", cwd=tmp_path)
    first, second = backend.requests
    assert first == GenerationRequest(
        messages=(user_turn("A cute cat", 0, 1),),
        image=((tmp_path / "upload.tmp").read_bytes(), (tmp_path / "dog.png").read_bytes()),
        modality="image",
        num_inference_steps=25,
        seed=42,
    )
    assert (second.height, second.width) == (None, 64)


def test_an_image_file_has_the_media_type_of_its_content(tmp_path: Path) -> None:
    formats = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ico")
    for name in formats:
        Image.fromarray(PIXELS).save(tmp_path / name, format=name)
    body = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take() -> None:
            connection, _ = listener.accept()
            with connection:
                while b'"modalities"' not in body and (piece := connection.recv(65536)):  # it follows the images
                    body.extend(piece)

        thread = threading.Thread(target=take)
        thread.start()
        files = [option for name in formats for option in ("-i", name)]
        run_client("-s", f"127.0.0.1:{listener.getsockname()[1]}", *files, cwd=tmp_path)
        thread.join()
    sent = re.findall(rb'"url": "data:([^;]*);base64,', body)
    assert sent == [*(f"image/{name}".encode() for name in formats[:-1]), b"application/octet-stream"]


def test_an_image_is_taken_whatever_the_task(tmp_path: Path) -> None:
    backend = FakeClient()
    Image.fromarray(PIXELS).save(tmp_path / "cat.png")
    with live_proxy(backend) as url:
        run_client("-s", url, "-m", "text2img", "-i", "cat.png", cwd=tmp_path)
    [request] = backend.requests
    assert (request.image, request.height) == (((tmp_path / "cat.png").read_bytes(),), None)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with live_proxy(FakeClient(InvalidRequest("height=17 is not allowed", "height"))) as url:
        done = run_client("-s", url, "--height", "17", cwd=tmp_path)
    assert done.returncode == 1
    assert last_line(done) == "the server refused the request (400): height=17 is not allowed"


def test_a_key_is_sent_and_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    settings = replace(SETTINGS, http=HttpOptions(api_keys=("secret",)))
    with live_proxy(FakeClient(), settings=settings) as url:
        refused = run_client("-s", url, cwd=tmp_path)
        done = run_client("-s", url, "--api-key", "secret", cwd=tmp_path)
    assert (refused.returncode, done.returncode) == (1, 0)
    assert last_line(refused).startswith("the server refused the request (401): an API key is required")
    assert last_line(refused).endswith("; --api-key gives one")


def test_the_base_url_of_openai_clients_is_taken_too(tmp_path: Path) -> None:
    with live_proxy(FakeClient()) as url:
        done = run_client("-s", f"{url}/v1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"])
def test_another_servers_port_has_a_hint(tmp_path: Path, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):  # to close with a part of the request unread resets the connection
                    pass

        thread = threading.Thread(target=reply)
        thread.start()
        done = run_client("-s", f"127.0.0.1:{listener.getsockname()[1]}", cwd=tmp_path)
        thread.join()
    assert done.returncode == 1
    assert "is this the port of the OpenAI API? It is 8091 by default" in last_line(done)


def test_without_streaming_the_same_is_shown(tmp_path: Path) -> None:
    for script, options in (
        (THOUGHT_IMAGES, ("--think", "--n", "2")),
        (ONE_ANSWER, ("-m", "text2text")),
        (TWO_ANSWERS, ("-m", "text2text", "--n", "2", "--temperature", "1")),
    ):
        with live_proxy(FakeClient(*script)) as url:
            streamed = run_client("-s", url, *options, cwd=tmp_path)
            whole = run_client("-s", url, "--no-stream", *options, cwd=tmp_path)
        assert (whole.returncode, whole.stdout.splitlines()[:2]) == (0, streamed.stdout.splitlines()[:2])
        assert whole.stderr.splitlines()[:2] == streamed.stderr.splitlines()[:2]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("-p", "\udcff"), "the server refused the request (400): messages[0].content[0].text='"),
        (
            ("-m", "text2text", "--temperature", "nan"),
            "the server refused the request (400): temperature=NaN is not allowed",
        ),
    ],
)
def test_what_json_cannot_carry_is_refused_by_the_server(tmp_path: Path, args: tuple[str, ...], text: str) -> None:
    with live_proxy(FakeClient()) as url:
        done = run_client("-s", url, *args, cwd=tmp_path)
    assert done.returncode == 1
    assert last_line(done).startswith(text)


def test_an_error_in_the_middle_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with live_proxy(FakeClient(*PROGRESS, Overloaded("the pool is full"))) as url:
        done = run_client("-s", url, cwd=tmp_path)
    assert done.returncode == 1
    assert last_line(done) == "the server gave up: the pool is full"
    assert not (tmp_path / "bagel_output.png").exists()


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("-o", "missing/cat.png"), 1, "cannot write missing/cat.png: missing is not a folder"),
        (("-s", "http://127.0.0.1:1"), 1, "no answer from http://127.0.0.1:1"),
        (("-s", "http://me:secret@127.0.0.1:1/api"), 1, "no answer from http://127.0.0.1:1/api: "),
        (("-s", "localhost"), 2, "argument --server/-s: 'localhost' is not allowed; allowed: HOST:PORT, http://HOST:"),
        (("-m", "img2img"), 2, "--modality img2img needs --image-url"),
        (("--pro", "cat"), 2, "unrecognized arguments: --pro cat"),
        (
            ("-m", "img2img", "-i", "missing.png"),
            1,
            "--image-url missing.png: not a URL, and as a file: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_sent_is_said_in_one_line(tmp_path: Path, args: tuple[str, ...], code: int, text: str) -> None:
    done = run_client(*args, cwd=tmp_path)
    assert done.returncode == code
    assert text in last_line(done)
