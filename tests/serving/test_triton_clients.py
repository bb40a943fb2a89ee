"""Triton without the proxy: gRPC streaming, HTTP ``generate_stream``, perf_analyzer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from bagel_triton.protocol.request import GenerationRequest
from tests.serving.test_together import EIGHT, image_body
from tests.support.serving import Server, generate

CLIENTS = Path(__file__).parents[2] / "client"
IMAGE = image_body(EIGHT[1], seed=5)
ARGUMENTS = ("--prompt", "A cute cat", "--height", "64", "--width", "64", "--steps", "4", "--seed", "5")


@pytest.mark.parametrize("model", ["bagel", "bagel_text2img"])
def test_the_grpc_client_gets_the_proxys_image(server: Server, model: str, tmp_path: Path) -> None:
    output = tmp_path / "cat.png"
    run(CLIENTS / "triton_grpc_client.py", "--server", server.grpc, "--model", model, "--output", output, *ARGUMENTS)
    assert_same(output, server)


@pytest.mark.parametrize("model", ["bagel_infer", "bagel_text2img"])
def test_the_http_client_gets_the_proxys_image(server: Server, model: str, tmp_path: Path) -> None:
    output = tmp_path / "cat.png"
    run(CLIENTS / "triton_http_client.py", "--server", server.http, "--model", model, "--output", output, *ARGUMENTS)
    assert_same(output, server)


@pytest.mark.parametrize("client", ["triton_grpc_client.py", "triton_http_client.py"])
def test_an_image_is_edited_after_thinking(server: Server, client: str, tmp_path: Path) -> None:
    source, output = tmp_path / "cat.png", tmp_path / "night.png"
    Image.new("RGB", (64, 48), "teal").save(source)
    address = server.grpc if "grpc" in client else server.http
    think = ("--think", "--max-think-tokens", "4")
    done = run(CLIENTS / client, "--server", address, "--image", source, "--output", output, *think, *ARGUMENTS)
    assert done.stderr.startswith("thinking:\n")
    with Image.open(output) as image:
        assert image.size == (64, 64)


def test_both_clients_print_the_proxys_answer(server: Server) -> None:
    asked = ("--modality", "text", "--prompt", "What is on it?", "--max-tokens", "5")
    by_grpc = run(CLIENTS / "triton_grpc_client.py", "--server", f"http://{server.grpc}", *asked)
    by_http = run(CLIENTS / "triton_http_client.py", "--server", f"http://{server.http}", *asked)
    body = {"messages": [{"role": "user", "content": "What is on it?"}], "modalities": ["text"], "max_tokens": 5}
    answer = server.chat(body).json()["choices"][0]["message"]["content"]
    assert by_grpc.stdout == by_http.stdout == f"{answer}\n"


def run(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("client", ["triton_grpc_client.py", "triton_http_client.py"])
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--output", "/nowhere/cat.png"), "cannot write /nowhere/cat.png: /nowhere is not a folder"),
        (("--output", "cat"), "cannot write cat: its name has no ending of an image, such as .png"),
        (("--height", "4294967360"), "height=4294967360 is not allowed; allowed: an integer that fits INT32"),
        (("--seed", str(2**64 + 1)), f"seed={2**64 + 1} is not allowed; allowed: an integer that fits INT64"),
        (("--negative", "\udcff"), r"negative_prompt='\udcff' is not allowed; allowed: UTF-8 text"),
    ],
)
def test_what_cannot_be_sent_or_written_is_one_line(
    server: Server, client: str, arguments: tuple[str, ...], line: str
) -> None:
    address = server.grpc if "grpc" in client else f"http://{server.http}"
    command = [sys.executable, CLIENTS / client, "--server", address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    [said] = done.stderr.splitlines()
    assert said.endswith(line)


def assert_same(output: Path, server: Server) -> None:
    with Image.open(output) as image:
        assert np.array_equal(np.array(image), server.images(IMAGE)[0])


@pytest.mark.parametrize("model", ["bagel", "bagel_text2img"])
def test_a_value_that_is_not_allowed_is_a_typed_error(server: Server, model: str) -> None:
    with pytest.raises(InferenceServerException) as refusal:
        generate(server.grpc, model, GenerationRequest(prompt="A cute cat", height=17))
    assert "InvalidRequest(height): height=17 is not allowed; allowed: a multiple of 16" in str(refusal.value)


def test_a_misspelt_field_is_refused(server: Server) -> None:
    body = {"prompt": "A cute cat", "heigth": 64, "width": 64, "num_inference_steps": 4}
    url = f"http://{server.http}/v2/models/bagel/generate_stream"
    answer = httpx.post(url, json=body, timeout=60, trust_env=False)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data")]
    assert (
        "InvalidRequest(heigth): heigth is not a known field; did you mean height? allowed: prompt, "
        in events[-1]["error"]
    )


@pytest.mark.parametrize(
    ("field", "message"), [("think", "think is no field of this model"), ("heigth", "did you mean height?")]
)
def test_the_ensemble_names_the_fields_that_it_has(server: Server, field: str, message: str) -> None:
    url = f"http://{server.http}/v2/models/bagel_text2img/generate"
    error = httpx.post(url, json={"prompt": "A cute cat", field: 1}, timeout=60, trust_env=False).json()["error"]
    inputs = (
        (Path(__file__).parents[2] / "model_repository/bagel_text2img/config.pbtxt")
        .read_text()
        .partition("output [")[0]
    )
    fields = re.findall(r'name: "(\w+)" data_type', inputs)
    assert len(fields) > 10
    assert message in error
    assert error.endswith(f"allowed: {', '.join(fields)}")
