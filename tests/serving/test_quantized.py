"""The toy in each form of quantised weights, through the whole server."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bagel_triton.deploy import vocabulary
from bagel_triton.serving.flags import TOY
from bagel_triton.serving.machine import source_file
from build.tiny_bagel.world import Scene, Thing, recognise
from tests.support.serving import Server, data_url

PROMPT = "a red circle on a blue background"
SCENE = Scene((Thing("circle", "red", "center", "large"),), ("blue",))
pytestmark = pytest.mark.long


@pytest.mark.parametrize("form", vocabulary.QUANTIZATIONS)
def test_it_draws_says_what_it_drew_and_batches_like_plain_weights(form: str) -> None:
    offload = ("--enable-layerwise-offload",) if form == "auto" else ()
    with Server(source_file(TOY), "--quantization", form, *offload) as server:
        auto = "none, offloaded to the host: all layers (auto: the first of none, int8, nf4, and that with layers on"
        chosen = f"{auto} the host, that fits)" if form == "auto" else form
        assert [line.split(maxsplit=1)[1].strip() for line in server.output if "quantization" in line] == [chosen]

        def drawn(seed: int) -> NDArray[np.uint8]:
            message = {"role": "user", "content": PROMPT}
            return server.images({"messages": [message], "modalities": ["image"], "seed": seed})[0]

        alone = [drawn(seed) for seed in (1, 2)]
        with ThreadPoolExecutor(2) as pool:
            assert all(map(np.array_equal, pool.map(drawn, (1, 2)), alone))
        assert recognise(alone[0]) == SCENE
        encoded = io.BytesIO()
        Image.fromarray(alone[0]).save(encoded, "PNG")
        image = {"type": "image_url", "image_url": {"url": data_url(encoded.getvalue())}}
        content = [image, {"type": "text", "text": "What color is the circle?"}]
        response = server.chat({"messages": [{"role": "user", "content": content}], "modalities": ["text"]})
        assert "red" in response.json()["choices"][0]["message"]["content"]
