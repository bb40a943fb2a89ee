"""A server of a checkpoint that is named, not given: downloaded from a hub on loopback, and served under that name."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support.hub_server import COMMITS, NAME, Hub
from tests.support.serving import Server


@pytest.mark.long
def test_a_repository_is_served_under_its_name(checkpoint_dir: Path, tmp_path: Path) -> None:
    with Hub.of(checkpoint_dir, {}) as hub:
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        with Server(Path(NAME), "--revision", "v1", environment=environment) as server:
            assert f"/models--tiny-org--tiny-bagel/snapshots/{COMMITS['v1']}" in "".join(server.output)
            models = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
            assert models[0]["id"] == "tiny-bagel"
            body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "modalities": ["text"]}
            response = server.chat({**body, "max_tokens": 3})
            assert response.status_code == 200, response.text
            assert response.json()["model"] == NAME
