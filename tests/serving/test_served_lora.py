"""Adapters through the whole server: by each name, and by default."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.protocol.request import GenerationRequest
from tests.support.exact import same_image
from tests.support.lora import write_layers
from tests.support.runs import generate
from tests.support.serving import ANSWER_S, Server
from tests.support.serving import generate as generated
from tests.support.waiting import soon

pytestmark = pytest.mark.long
FIELDS = {"height": 64, "width": 48, "num_inference_steps": 4, "seed": 3, "cfg_text_scale": 4.0}
REFUSED = r"bagel_requests_total\{status=\"400\"\}"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    names = "style", "sketch", "usual"
    return {name: write_layers(folder / name, seed, rank=4) for seed, name in enumerate(names)}


@pytest.fixture(scope="module")
def served(checkpoint_dir: Path, adapters: dict[str, str]) -> Iterator[Server]:
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    options = ("--lora-dir", str(Path(adapters["style"]).parent), "--admin-api-key", "admin")
    options += ("--default-sampling-params", '{"lora": "usual"}')
    with Server(checkpoint_dir, "--served-model-name", "bagel", *options, "--lora-modules", *modules) as server:
        yield server


def test_images_of_several_adapters_are_those_of_stages_in_this_process(
    served: Server, checkpoint_dir: Path, adapters: dict[str, str]
) -> None:
    def drawn(fields: dict[str, str]) -> NDArray[np.uint8]:
        message = {"role": "user", "content": "A cute cat"}
        return served.images({"messages": [message], "modalities": ["image"], **FIELDS, **fields})[0]

    asked = [{"lora": "style"}, {"model": "sketch"}, {}, {"model": "bagel:style"}]
    with ThreadPoolExecutor(len(asked)) as pool:
        images = list(pool.map(drawn, asked))
    stages = LocalStages(DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", lora_modules=adapters))
    try:
        requests = [GenerationRequest(prompt="A cute cat", lora=name, **FIELDS) for name in (None, *adapters)]
        plain, style, sketch, usual = (generate(stages, request).pixels[0].numpy() for request in requests)
    finally:
        stages.close()
    assert all(map(same_image, images, (style, sketch, usual, style)))
    assert not np.array_equal(plain, style)


def test_they_are_listed_and_others_are_not_found(served: Server) -> None:
    listed = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [
        ("bagel", None),
        ("style", "bagel"),
        ("sketch", "bagel"),
        ("usual", "bagel"),
    ]
    for field in ("lora", "model"):
        body = {"messages": [{"role": "user", "content": "hi"}], "modalities": ["text"], field: "other"}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, field)


def change(served: Server, action: str, **body: str) -> httpx.Response:
    admin = {"Authorization": "Bearer admin"}
    return httpx.post(f"{served.url}/v1/{action}_lora_adapter", json=body, headers=admin, timeout=ANSWER_S)


def test_one_is_loaded_and_unloaded_while_its_request_runs(served: Server) -> None:
    def drawn(**fields: object) -> NDArray[np.uint8]:
        message = {"role": "user", "content": "A cute cat"}
        return served.images({"messages": [message], "modalities": ["image"], **FIELDS, **fields})[0]

    def listed() -> list[str]:
        return [model["id"] for model in httpx.get(f"{served.url}/v1/models").json()["data"]]

    assert change(served, "load", lora_name="again", lora_path="style").status_code == 200
    assert listed() == ["bagel", "style", "sketch", "usual", "again"]
    expected = drawn(model="style")
    assert same_image(drawn(model="again"), expected)
    requests = served.gauge(REFUSED)
    refused = [
        change(served, "load", lora_name="again", lora_path="style"),
        change(served, "load", lora_name="more", lora_path="nowhere"),
        change(served, "load", lora_name="more", lora_path="/etc"),
        change(served, "unload", lora_name="more"),
    ]
    assert [reply.status_code for reply in refused] == [400, 404, 400, 404], [reply.text for reply in refused]
    assert served.gauge(REFUSED) == requests
    with ThreadPoolExecutor() as pool:
        running = pool.submit(drawn, model="again", num_inference_steps=100)
        assert soon(lambda: served.gauge("bagel_requests_active") > 0)
        assert change(served, "unload", lora_name="again").status_code == 200
        assert running.result().shape == expected.shape
    assert listed() == ["bagel", "style", "sketch", "usual"]
    body = {"messages": [{"role": "user", "content": "hi"}], "modalities": ["image"], "lora": "again", **FIELDS}
    assert served.chat(body).status_code == 404


def test_an_image_by_the_ensemble_ends_before_its_adapter_is_unloaded(served: Server) -> None:
    """It has the default adapter, and no orchestrator follows it."""
    request = GenerationRequest(prompt="A cute cat", **(FIELDS | {"num_inference_steps": 100}))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(generated, served.grpc, "bagel_text2img", request)
        assert soon(lambda: served.gauge("bagel_dit_active") > 0)
        assert change(served, "unload", lora_name="usual").status_code == 200
        assert running.done()
        assert running.result().last("generated_image").shape == (64, 48, 3)
    body = {"messages": [{"role": "user", "content": "hi"}], "modalities": ["image"], **FIELDS}
    assert served.chat(body).status_code == 404
