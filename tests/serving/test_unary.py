"""One request, one answer: KServe ``infer`` and ``generate`` over HTTP and gRPC, a plain perf_analyzer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http
from tritonclient.utils import InferenceServerException

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.deploy.topology import BAGEL
from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest
from bagel_triton.protocol.tensors import Arrays, to_tensors
from tests.serving.test_together import EIGHT, image_body
from tests.support.exact import same_image
from tests.support.serving import ANSWER_S, Server, generate
from tests.support.triton_host import triton_host

CAT = GenerationRequest(prompt="A cute cat", height=64, width=64, num_inference_steps=4, seed=5)


def unary(client_module: Any, address: str, model: str, request: GenerationRequest, outputs: list[str]) -> Arrays:
    """One ``infer`` call by a client of Triton's own."""
    inputs = []
    for name, array in to_tensors(request).items():
        inputs.append(client_module.InferInput(name, list(array.shape), REQUEST_FIELDS[name].datatype))
        inputs[-1].set_data_from_numpy(array)
    wanted = [client_module.InferRequestedOutput(name) for name in outputs]
    options = {} if client_module is by_grpc else {"network_timeout": ANSWER_S}
    with client_module.InferenceServerClient(address, **options) as client:
        result = client.infer(model, inputs, outputs=wanted)
        return {name: result.as_numpy(name) for name in outputs if result.as_numpy(name) is not None}


@pytest.fixture(params=[by_grpc, by_http], ids=["grpc", "http"])
def infer(server: Server, request: pytest.FixtureRequest) -> Any:
    address = server.grpc if request.param is by_grpc else server.http
    return lambda *args: unary(request.param, address, *args)


@pytest.fixture(scope="module")
def cat(server: Server) -> np.ndarray:
    return generate(server.grpc, "bagel", CAT).last("generated_image")


def test_infer_on_the_ensemble(infer: Any, cat: np.ndarray) -> None:
    answer = infer("bagel_text2img", CAT, ["generated_image", "used_seed"])
    assert same_image(answer["generated_image"], cat)
    assert answer["used_seed"].tolist() == [5]


def test_infer_on_the_whole_pipeline(infer: Any, cat: np.ndarray) -> None:
    answer = infer("bagel_infer", CAT, ["event", "generated_image"])
    assert same_image(answer["generated_image"], cat)
    events = [json.loads(event) for event in answer["event"]]
    assert [event["type"] for event in events] == ["image", "done"]
    assert events[0] == {"type": "image", "index": 0, "height": 64, "width": 64, "seed": 5}


def test_infer_of_several_images_has_them_below_each_other(infer: Any, cat: np.ndarray) -> None:
    request = GenerationRequest(prompt="A cute cat", height=64, width=64, num_inference_steps=4, seed=5, n=2)
    answer = infer("bagel_infer", request, ["event", "generated_image"])
    assert answer["generated_image"].shape == (128, 64, 3)
    assert same_image(answer["generated_image"][:64], cat)


def test_infer_of_a_text(infer: Any) -> None:
    request = GenerationRequest(prompt="Hi", modality="text", max_tokens=5)
    answer = infer("bagel_infer", request, ["event"])
    assert [json.loads(event)["type"] for event in answer["event"]] == ["answer", "done"]


@pytest.mark.parametrize("model", ["bagel_infer", "bagel_text2img"])
def test_a_value_that_is_not_allowed_is_a_typed_error(infer: Any, model: str) -> None:
    with pytest.raises(InferenceServerException, match=r"InvalidRequest\(height\): height=17 is not allowed"):
        infer(model, GenerationRequest(prompt="A cute cat", height=17), ["generated_image"])


def test_generate_on_bagel_without_streaming(server: Server, cat: np.ndarray) -> None:
    body = {"prompt": "A cute cat", "height": 64, "width": 64, "num_inference_steps": 4, "seed": 5, "stream": False}
    url = f"http://{server.http}/v2/models/bagel/generate"
    reply = httpx.post(url, json=body, timeout=ANSWER_S, trust_env=False)
    assert reply.status_code == 200, reply.text
    assert same_image(np.array(reply.json()["generated_image"], np.uint8).reshape(64, 64, 3), cat)
    assert [json.loads(event)["type"] for event in reply.json()["event"]] == ["image", "done"]


@pytest.mark.parametrize("model", ["bagel_infer", "bagel_text2img"])
def test_generate_on_unary_models(server: Server, cat: np.ndarray, model: str) -> None:
    body = {"prompt": "A cute cat", "height": 64, "width": 64, "num_inference_steps": 4, "seed": 5}
    url = f"http://{server.http}/v2/models/{model}/generate"
    reply = httpx.post(url, json=body, timeout=ANSWER_S, trust_env=False)
    assert reply.status_code == 200, reply.text
    assert same_image(np.array(reply.json()["generated_image"], np.uint8).reshape(64, 64, 3), cat)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("model", "options"),
    [("bagel_text2img", ()), ("bagel_infer", ()), ("bagel", ("--streaming",))],
    ids=["ensemble", "bagel_infer", "bagel"],
)
def test_perf_analyzer_measures_whole_images(
    server: Server, tmp_path: Path, model: str, options: tuple[str, ...], protocol: str
) -> None:
    if options and protocol == "http":
        pytest.skip("a decoupled model streams, over gRPC")
    request: dict[str, Any] = {"prompt": ["A cute cat"], "height": [32], "width": [32], "num_inference_steps": [2]}
    data = tmp_path / "input.json"
    data.write_text(json.dumps({"data": [request | ({"stream": [False]} if options else {})]}))
    address = server.grpc if protocol == "grpc" else server.http
    arguments = ["-m", model, "-u", address, "-i", protocol, *options, "--input-data", str(data)]
    command = [Path(sys.executable).with_name("bagel-triton"), "perf-analyzer", "--", *arguments]
    images = server.gauge("bagel_images_total")
    limits = ["--concurrency-range", "2", "--request-count", "10"]
    done = subprocess.run([*command, *limits], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Concurrency: 2, throughput:" in done.stdout
    assert server.gauge("bagel_images_total") >= images + 10


@pytest.mark.long
def test_a_server_without_grpc_serves_over_http(checkpoint_dir: Path, tmp_path: Path, server: Server) -> None:
    wanted = server.images(image_body(EIGHT[1], seed=5))[0]
    models = BAGEL.models
    with triton_host(
        DeployConfig(str(checkpoint_dir)), models, tmp_path / "host", options=["--allow-grpc=false"]
    ) as host:
        address = host.url.removeprefix("http://")
        for model in ("bagel_infer", "bagel_text2img"):
            answer = unary(by_http, address, model, CAT, ["generated_image"])
            assert same_image(answer["generated_image"], wanted)
        url = f"{host.url}/v2/models/bagel/generate_stream"
        body = {"prompt": "A cute cat", "height": 64, "width": 64, "num_inference_steps": 4, "seed": 5}
        reply = httpx.post(url, json=body, timeout=ANSWER_S, trust_env=False)
        assert '"type\\":\\"done\\"' in reply.text.splitlines()[-2]
