"""A whole server on a GPU, in both topologies: KV by CUDA IPC, or within one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.cases import load_cases
from tests.support.nearness import mean_levels
from tests.support.serving import Server, chat_body

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="the stages are to share a GPU; there is none here"),
]
ROOT = Path(__file__).parents[2]
CASES = {case.name: case for case in load_cases(ROOT / "tests" / "data" / "cases-a")}
ASKED = ("t2i_default", "t2i_think", "t2i_taylorseer", "edit_default", "edit_alpha_two_pictures")
LEVELS = 4.0  # of bfloat16


@pytest.fixture(scope="module", params=["bagel", "bagel_single_stage"])
def server(request: pytest.FixtureRequest, checkpoint_dir: Path) -> Iterator[Server]:
    """A server that leaves no leases behind."""
    config = ROOT / "build" / "deploy" / f"{request.param}.yaml"
    # Other tests hide the GPUs from the servers that they start.
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES") or "0"}
    with Server(checkpoint_dir, "--device", "cuda", "--deploy-config", str(config), environment=visible) as running:
        yield running
        assert running.gauge("bagel_thinker_kv_leases") == 0
        assert running.gauge("bagel_thinker_kv_blocks_used") == 0


def test_it_says_what_it_runs_on(server: Server) -> None:
    said = "".join(server.output)
    one_process = "bagel_single_stage.yaml" in str(server.process.args)
    assert "cuda:0" in said
    assert "bfloat16" in said
    assert ("local" if one_process else "cuda_ipc") in said


def test_images_asked_for_together_are_near_those_recorded(server: Server) -> None:
    bodies = [chat_body(CASES[name].request) for name in ASKED]
    with ThreadPoolExecutor(len(ASKED)) as clients:
        answers = list(clients.map(server.images, bodies))
    for name, (pixels,) in zip(ASKED, answers, strict=True):
        assert mean_levels(torch.from_numpy(pixels), CASES[name].image()) < LEVELS, name


def test_a_text_is_answered(server: Server) -> None:
    reply = server.chat(chat_body(CASES["chat"].request)).json()
    assert reply["choices"][0]["message"]["content"]
