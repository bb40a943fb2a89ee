"""The other topologies give the answers of the default one, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.test_together import assert_same_reply
from tests.support.cases import load_cases
from tests.support.proxy_process import proxy_process
from tests.support.serving import Server, chat_body

ROOT = Path(__file__).parents[2]
CASES = load_cases(ROOT / "tests" / "data" / "cases-a")
ASKED = ("t2i_default", "t2i_think", "t2i_taylorseer", "edit_think", "vqa", "vqa_think", "chat", "chat_verbatim")
BODIES = {case.name: chat_body(case.request) | {"think": bool(case.request.think)} for case in CASES}


@pytest.fixture(scope="module", params=["bagel_think", "bagel_single_stage"])
def other(request: pytest.FixtureRequest, checkpoint_dir: Path) -> Iterator[Server]:
    config = ROOT / "build" / "deploy" / f"{request.param}.yaml"
    with Server(checkpoint_dir, "--deploy-config", str(config)) as running:
        yield running


@pytest.mark.parametrize("name", ASKED)
def test_the_same_answer_from_every_topology(server: Server, other: Server, name: str) -> None:
    assert_same_reply(other.chat(BODIES[name]).json(), server.chat(BODIES[name]).json())


def test_only_bagel_think_thinks_unasked(server: Server, other: Server) -> None:
    body = {name: value for name, value in BODIES["t2i_think"].items() if name not in ("think", "max_think_tokens")}
    reasoning = server.chat(BODIES["t2i_think"]).json()["choices"][0]["message"]["reasoning_content"]
    unasked = other.chat(body).json()["choices"][0]["message"].get("reasoning_content")
    thinks = "bagel_think.yaml" in str(other.process.args)
    assert unasked == (reasoning if thinks else None)


def test_health_names_the_models_of_the_topology_even_at_a_proxy_without_it(other: Server) -> None:
    health = httpx.get(f"{other.url}/health", trust_env=False)
    assert health.status_code == 200
    with proxy_process("--triton-grpc", other.grpc) as (_, url):
        assert httpx.get(f"{url}/health", trust_env=False).json() == health.json()
    single = "bagel_single_stage.yaml" in str(other.process.args)
    assert (set(health.json()["models"]) == {"bagel"}) == single
