"""The commands that users bring along: curl as printed in vLLM-Omni's BAGEL guide, and this project's client."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.serving import Server, reply_images

CLIENT = Path(__file__).parents[2] / "client" / "openai_chat_client.py"
CURL = Path(__file__).parents[1] / "data" / "curl"  # the bodies as printed; ${IMAGE_BASE64} is the shell's
CAT = Path(__file__).parents[1] / "data" / "cases-a" / "vqa_think.input.png"
TEXT2IMG = (CURL / "text2img.json").read_text()
IMG2IMG = (CURL / "img2img.json").read_text()
IMG2TEXT = (CURL / "img2text.json").read_text()
TEXT2TEXT = (CURL / "text2text.json").read_text()


def curl(server: Server, body: str, tmp_path: Path) -> dict[str, object]:
    payload = tmp_path / "payload.json"
    payload.write_text(body.replace("${IMAGE_BASE64}", base64.b64encode(CAT.read_bytes()).decode()))
    command = ["curl", "-sS", "--noproxy", "*", f"{server.url}/v1/chat/completions"]
    answer = subprocess.run(
        [*command, "-H", "Content-Type: application/json", "-d", f"@{payload}"],
        capture_output=True,
        check=True,
        timeout=240,
    )
    reply = json.loads(answer.stdout)
    assert "error" not in reply, reply
    return reply


@pytest.mark.parametrize("body", [TEXT2IMG, IMG2IMG], ids=["text2img", "img2img"])
def test_curl_for_an_image(server: Server, body: str, tmp_path: Path) -> None:
    (image,) = reply_images(curl(server, body, tmp_path))
    assert image.shape == (512, 512, 3)
    assert image.std() > 0


@pytest.mark.parametrize("body", [IMG2TEXT, TEXT2TEXT], ids=["img2text", "text2text"])
def test_curl_for_a_text(server: Server, body: str, tmp_path: Path) -> None:
    reply = curl(server, body.replace('"modalities"', '"max_tokens": 12, "modalities"'), tmp_path)
    message = reply["choices"][0]["message"]  # type: ignore[index]
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
    assert message["content"]
    assert reply["usage"]["completion_tokens"] <= 12  # type: ignore[index]


def test_a_bare_prompt_is_the_wrapped_one(server: Server, tmp_path: Path) -> None:
    small = TEXT2IMG.replace("512", "64").replace("50", "5")
    wrapped = reply_images(curl(server, small, tmp_path))
    bare = reply_images(curl(server, small.replace("<|im_start|>", "").replace("<|im_end|>", ""), tmp_path))
    assert np.array_equal(wrapped, bare)


def client(server: Server, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, CLIENT, "--server", server.url, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_the_client_makes_an_image(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "cat.png"
    run = client(server, "-p", "A cute cat", "-o", output, "--height", "64", "--width", "96", "--steps", "5")
    assert run.returncode == 0, run.stderr
    assert image_size(output) == (96, 64)
    assert str(output) in run.stdout


def test_the_client_edits_an_image(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "cat.png"
    run = client(server, "-m", "img2img", "-i", CAT, "-p", "Make the cat stand up", "-o", output, "--steps", "3")
    assert run.returncode == 0, run.stderr
    assert image_size(output) == (688, 512), "without a size the image keeps its own, resized"


@pytest.mark.parametrize("arguments", [["-m", "img2text", "-i", CAT], ["-m", "text2text"]])
def test_the_client_prints_text(server: Server, arguments: list[str | Path]) -> None:
    run = client(server, *arguments, "-p", "Describe this", "--max-tokens", "8")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_client_prints_the_servers_refusal(server: Server, tmp_path: Path) -> None:
    run = client(server, "--height", "17", "-o", tmp_path / "no.png")
    assert run.returncode == 1
    assert "height" in run.stderr
    assert "17" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "no.png").exists()
