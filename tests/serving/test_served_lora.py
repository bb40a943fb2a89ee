"""Adapters through the whole server: by each name, beside requests without one."""

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
from tests.support.serving import Server

pytestmark = pytest.mark.long
FIELDS = {"height": 64, "width": 48, "num_inference_steps": 4, "seed": 3, "cfg_text_scale": 4.0}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_layers(folder / name, seed, rank=4) for seed, name in enumerate(("style", "sketch"))}


@pytest.fixture(scope="module")
def served(checkpoint_dir: Path, adapters: dict[str, str]) -> Iterator[Server]:
    modules = [f"{name}={folder}" for name, folder in adapters.items()]
    with Server(checkpoint_dir, "--served-model-name", "bagel", "--lora-modules", *modules) as server:
        yield server


def test_images_of_several_adapters_are_those_of_stages_in_this_process(
    served: Server, checkpoint_dir: Path, adapters: dict[str, str]
) -> None:
    def drawn(fields: dict[str, str]) -> NDArray[np.uint8]:
        message = {"role": "user", "content": "A cute cat"}
        return served.images({"messages": [message], "modalities": ["image"], **FIELDS, **fields})[0]

    asked = [{}, {"lora": "style"}, {"model": "sketch"}, {"model": "bagel:style"}]
    with ThreadPoolExecutor(len(asked)) as pool:
        images = list(pool.map(drawn, asked))
    stages = LocalStages(DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", lora_modules=adapters))
    try:
        requests = [GenerationRequest(prompt="A cute cat", lora=name, **FIELDS) for name in (None, *adapters)]
        plain, style, sketch = (generate(stages, request).pixels[0].numpy() for request in requests)
    finally:
        stages.close()
    assert all(map(same_image, images, (plain, style, sketch, style)))
    assert not np.array_equal(plain, style)


def test_they_are_listed_and_others_are_not_found(served: Server) -> None:
    listed = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [
        ("bagel", None),
        ("style", "bagel"),
        ("sketch", "bagel"),
    ]
    for field in ("lora", "model"):
        body = {"messages": [{"role": "user", "content": "hi"}], "modalities": ["text"], field: "other"}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (404, field)
