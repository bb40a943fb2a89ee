"""vLLM-Omni's own deploy files, as they are, and its stages' commands, served: recorded cases agree."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bagel_triton.serving.machine import free_port
from tests.serving.test_cases import assert_recorded
from tests.support.cases import load_cases
from tests.support.connectors import require_mooncake
from tests.support.serving import Server, chat_body, reply_images

DATA = Path(__file__).parents[1] / "data"
CASES = {case.name: case for case in load_cases(DATA / "cases-a")}
FILES = ("bagel", "bagel_two_devices", "bagel_single_stage", "stage_configs_bagel")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=FILES)
def served(request: pytest.FixtureRequest, checkpoint_dir: Path) -> Iterator[Server]:
    file = DATA / "seeds" / "deploy" / f"{request.param}.yaml"
    options = ("--omni", "--deploy-config", str(file), "--device", "cpu", "--dtype", "float32")
    with Server(checkpoint_dir, *options) as server:
        yield server


@pytest.mark.parametrize("name", ["t2i_default", "edit_default"])
def test_recorded_images_agree(served: Server, name: str) -> None:
    (pixels,) = served.images(chat_body(CASES[name].request))
    assert_recorded(pixels, CASES[name])


def test_the_recorded_answer_agrees_without_the_files_penalty(served: Server) -> None:
    case = CASES["chat"]
    body = chat_body(case.request) | {"repetition_penalty": 1.0}
    assert served.chat(body).json()["choices"][0]["message"]["content"] == case.text


def test_a_request_without_a_seed_has_the_files(served: Server) -> None:
    body = {"messages": [{"role": "user", "content": "A cat"}], "modalities": ["image"], "num_inference_steps": 3}
    body |= {"height": 64, "width": 64}
    (first,), (same,), (other,) = (
        served.images(body),
        served.images(body | {"seed": 52}),
        served.images(body | {"seed": 1}),
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_stage_1_that_registers_serves(checkpoint_dir: Path) -> None:
    require_mooncake()
    common = ("--dtype", "float32", "--device", "cpu", "-oma", "127.0.0.1", "-omp", str(free_port("127.0.0.1", 0)))
    with ThreadPoolExecutor(1) as other:
        second = other.submit(Server, checkpoint_dir, "--stage-id", "1", "--headless", *common)
        with Server(checkpoint_dir, "--stage-id", "0", *common) as first, second.result():
            response = first.chat(chat_body(CASES["t2i_default"].request))
            assert response.status_code == 200, response.text
            (pixels,) = reply_images(response.json())
            assert_recorded(pixels, CASES["t2i_default"])
            assert "waiting for stage 1 to register at 127.0.0.1:" in "".join(first.output)
