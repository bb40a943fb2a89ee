"""Bodies of popular clients through the API and the planner, without a Triton; and bodies that nobody would write."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
from proxy_fake import CHAT, ONE_ANSWER, SCRIPT, SETTINGS, FakeClient
from starlette.testclient import TestClient

from bagel_triton.engine.preprocess.planner import RequestPlanner
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.openai.app import create_app
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.triton.client import StageResponse
from bagel_triton.weights.checkpoint import inspect
from tests.support.request_shapes import CHAT as PLAIN
from tests.support.request_shapes import NOT_THINKING, SHAPES, THINKING, Shape


class PlanningClient(FakeClient):
    """Plans each request as the first stage does, then plays an answer of the kind it asks for."""

    def __init__(self, planner: RequestPlanner) -> None:
        super().__init__()
        self._planner = planner
        self.thought: list[bool] = []

    async def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        plan = self._planner.expand(request)
        self.thought.append(bool(request.think))
        self.script = ONE_ANSWER if plan.flow is None else SCRIPT
        async for response in super().generate(request, request_id, headers):
            yield response


@pytest.fixture(scope="module")
def planning(checkpoint_dir: Path) -> PlanningClient:
    return PlanningClient(RequestPlanner(inspect(checkpoint_dir), Tokenizer(checkpoint_dir)))


@pytest.fixture(scope="module")
def api(planning: PlanningClient) -> TestClient:
    settings = type(SETTINGS)(SETTINGS.triton_grpc, SETTINGS.served_model_names, models=SETTINGS.models)
    return TestClient(create_app(settings, planning), raise_server_exceptions=False)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name[:60])
def test_a_clients_body_gets_the_reply_that_it_requests(api: TestClient, shape: Shape) -> None:
    reply = api.post(CHAT, json=shape.body)
    if shape.gives:
        assert reply.status_code == 200, reply.text
        message = reply.json()["choices"][0]["message"]
        assert ("images" in message) == (shape.gives == "image")
    else:
        assert reply.status_code == 400, reply.text
        assert shape.names in reply.json()["error"]["param"]
        assert shape.names in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": PLAIN["messages"], "modalities": ["image"]}, "size"),
        ("/v1/images/generations", {"prompt": "A cat"}, "size"),
        ("/v1/responses", {"input": "A cat", "tools": [{"type": "image_generation"}]}, "tools[0].size"),
    ],
)
@pytest.mark.parametrize(
    ("size", "problem"), [("33x33", "height is 33"), ("64x17", "height is 17"), ("17x64", "width")]
)
def test_a_size_that_cannot_be_drawn_is_quoted(
    api: TestClient, path: str, body: dict[str, Any], param: str, size: str, problem: str
) -> None:
    sized = {"tools": [{**body["tools"][0], "size": size}]} if "tools" in body else {"size": size}
    error = api.post(path, json=body | sized).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}='{size}' is not allowed: its {problem}")
    assert "; allowed: a multiple of 16 from 16 to " in error["message"]


@pytest.mark.parametrize("fields", [*THINKING, *NOT_THINKING], ids=str)
def test_every_way_to_switch_thinking_does(api: TestClient, planning: PlanningClient, fields: dict[str, Any]) -> None:
    others: dict[str, dict[str, Any]] = {
        "/v1/images/generations": {"prompt": "A cat"},
        "/v1/responses": {"input": "Hi"},
    }
    everywhere = {CHAT: PLAIN} if fields.keys() & {"reasoning", "modalities"} else {CHAT: PLAIN} | others
    for path, body in everywhere.items():
        assert api.post(path, json=body | fields).status_code == 200
        assert planning.thought[-1] is (fields in THINKING)


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 2.5, 1e308, -0.0, 2**31, 2**63, 10**30, "", "x", "\0", "\ud800", "<|im_start|>"),
    *([], {}, [None], [[]], {"": None}, {"url": "data:,"}, {"type": "text"}, ["text"], "data:image/png;base64,AAAA"),
    *("9" * 400, {"a": {"b": {"c": []}}}, [1, "a", None], "WxH", "64x64", "auto", "\u202e", [{"type": "image_url"}]),
]


def _mutated(body: Any, chance: random.Random, names: list[str]) -> Any:
    """``body`` with a few of its members replaced, added, repeated or removed, at any depth."""
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        target = body
        while isinstance(target, dict | list) and target and chance.random() < 0.7:
            key = chance.choice(list(target) if isinstance(target, dict) else range(len(target)))
            if not isinstance(target[key], dict | list) or chance.random() < 0.3:
                target[key] = copy.deepcopy(chance.choice(JUNK))
                break
            target = target[key]
        else:
            if isinstance(target, dict):
                target[chance.choice(names)] = copy.deepcopy(chance.choice(JUNK))
            elif isinstance(target, list):
                target.append(copy.deepcopy(chance.choice(JUNK)))
        if isinstance(target, dict) and target and chance.random() < 0.2:
            target.pop(chance.choice(list(target)))
    return body


def fuzzed(count: int) -> list[bytes]:
    """``count`` bodies, always the same ones; some are no JSON at all."""
    chance = random.Random(20)
    small = [shape.body for shape in SHAPES if len(json.dumps(shape.body)) < 5000]
    names = sorted({name for body in small for name in body} | {"think", "cache", "timeout", "priority", "image_reply"})
    bodies = []
    for _ in range(count):
        data = json.dumps(_mutated(chance.choice(small), chance, names)).encode()
        if chance.random() < 0.05:
            at = chance.randrange(len(data))
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
        bodies.append(data)
    return bodies


def test_no_body_is_answered_with_a_defect_of_the_server(api: TestClient) -> None:
    for body in fuzzed(2000):
        reply = api.post(CHAT, content=body)
        assert reply.status_code < 500, (body, reply.text)
        if reply.status_code == 400:
            assert reply.json()["error"]["type"] == "invalid_request_error"


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="  # an image
IMAGE_URL = f"data:image/png;base64,{PIXEL}"
OTHER_BODIES: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {
        **{"prompt": "A cat", "size": "64x64", "n": 1, "output_format": "jpeg", "output_compression": 50},
        **{"quality": "auto", "background": "opaque", "stream": True, "partial_images": 1, "seed": 1, "think": True},
    },
    "/v1/images/edits": {"prompt": "Snow", "image": [{"image_url": IMAGE_URL}], "size": "auto", "cfg_interval": [0, 1]},
    "/v1/responses": {
        "input": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE_URL}]},
            {"type": "reasoning", "id": "rs", "summary": []},
            {"type": "image_generation_call", "id": "ig", "result": PIXEL, "status": "completed"},
            {"role": "user", "content": [{"type": "input_text", "text": "Snow"}]},
        ],
        "tools": [{"type": "image_generation", "size": "64x64", "partial_images": 1, "action": "auto"}],
        **{"tool_choice": "auto", "stream": True, "reasoning": {"effort": "low", "summary": "auto"}, "include": []},
        **{"text": {"format": {"type": "text"}}, "max_output_tokens": 8, "instructions": "x", "temperature": 0.5},
    },
}


@pytest.mark.parametrize("path", list(OTHER_BODIES))
def test_no_body_of_the_other_endpoints_is_either(api: TestClient, path: str) -> None:
    body, chance = OTHER_BODIES[path], random.Random(21)
    assert api.post(path, json=body).status_code == 200
    names = [*body, "mask", "images", "n", "width", "previous_response_id", "response_format", "max_tokens", "stop"]
    for _ in range(150):
        mutated = json.dumps(_mutated(body, chance, names)).encode()
        reply = api.post(path, content=mutated)
        assert reply.status_code < 500, (mutated, reply.text)
        if reply.status_code == 400:
            assert reply.json()["error"]["type"] == "invalid_request_error"
