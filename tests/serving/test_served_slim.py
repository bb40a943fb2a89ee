"""A server without what draws images."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.serving.test_together import image_body
from tests.support.killing import stage_pids
from tests.support.serving import Server

TEXT = {"messages": [{"role": "user", "content": "hi"}], "modalities": ["text"], "max_tokens": 8}
IMAGE = {"prompt": "A cute cat", "height": 32, "width": 32, "num_inference_steps": 3}


@pytest.mark.long
def test_a_server_that_only_understands(checkpoint_dir: Path, server: Server) -> None:
    expected = server.chat(TEXT).json()["choices"][0]["message"]["content"]
    with Server(checkpoint_dir, "--load", "understanding", "--admin-api-key", "admin") as slim:
        assert [stage_pids(slim, stage) for stage in ("dit", "vae_decode")] == [[], []]
        for path in ("/v1/sleep", "/v1/wake"):
            headers = {"Authorization": "Bearer admin"}
            assert httpx.post(slim.url + path, headers=headers, timeout=60, trust_env=False).status_code == 200
            assert httpx.get(f"{slim.url}/health", trust_env=False).status_code == 200
        assert slim.chat(TEXT).json()["choices"][0]["message"]["content"] == expected
        listed = httpx.get(f"{slim.url}/v1/models", trust_env=False).json()["data"][0]["architecture"]
        assert (listed["modality"], listed["output_modalities"]) == ("text+image->text", ["text"])
        refused = slim.chat(image_body(IMAGE, seed=1))
        assert refused.status_code == 400
        assert "load=all" in refused.json()["error"]["message"]
