from __future__ import annotations

import base64
import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image
from proxy_fake import (
    A_CAT,
    CHAT,
    ONE_ANSWER,
    PIXELS,
    SETTINGS,
    THOUGHT_IMAGES,
    TWO_ANSWERS,
    FakeClient,
    chat_body,
    http,
    image_part,
)
from starlette.testclient import TestClient

from bagel_triton.openai.app import create_app
from bagel_triton.protocol.request import GenerationRequest


def test_an_image_is_answered_losslessly_with_true_counts_seed_and_timings() -> None:
    client = FakeClient()
    reply = http(client).post(CHAT, json=chat_body(seed=7, height=32))
    assert reply.status_code == 200
    body = reply.json()
    assert client.requests == [GenerationRequest(messages=A_CAT, modality="image", seed=7, height=32)]
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "bagel"
    [choice] = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    assert "reasoning_content" not in choice["message"]
    [part] = choice["message"]["content"]
    np.testing.assert_array_equal(pixels_of(part), PIXELS)
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "completion_tokens_details": {"image_tokens": 6, "text_tokens": 0, "reasoning_tokens": 0},
    }
    assert body["seed"] == 7
    assert body["metrics"]["stages"] == {
        "thinker": {"queue_s": 0.25, "run_s": 0.5},
        "dit": {"queue_s": 1.0, "run_s": 2.0},
    }
    assert body["metrics"]["total_s"] >= 0


def pixels_of(part: dict[str, Any]) -> np.ndarray[Any, Any]:
    assert part["type"] == "image_url"
    head, _, data = part["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "PNG"
    return np.asarray(image)


def test_several_images_and_the_thinking_before_them_are_one_choice() -> None:
    body = http(FakeClient(*THOUGHT_IMAGES)).post(CHAT, json=chat_body(n=2, think=True)).json()
    [choice] = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"] == "A cat, in snow."
    first, second = choice["message"]["content"]
    np.testing.assert_array_equal(pixels_of(first), PIXELS)
    np.testing.assert_array_equal(pixels_of(second), PIXELS[::-1])
    assert (first["seed"], second["seed"], body["seed"]) == (7, 8, 7)
    assert body["usage"]["completion_tokens"] == 16
    details = {"image_tokens": 12, "text_tokens": 4, "reasoning_tokens": 4}
    assert body["usage"]["completion_tokens_details"] == details


def test_an_answer_is_text_and_greedy_text_has_no_seed() -> None:
    client = FakeClient(*ONE_ANSWER)
    body = http(client).post(CHAT, json=chat_body(modalities=["text"], max_tokens=5)).json()
    assert client.requests == [GenerationRequest(messages=A_CAT, modality="text", max_tokens=5)]
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Paris"}
    assert choice["finish_reason"] == "stop"
    assert body["seed"] is None
    assert body["usage"]["completion_tokens"] == 2


def test_each_answer_is_a_choice_with_its_own_thinking_and_end() -> None:
    body = http(FakeClient(*TWO_ANSWERS)).post(CHAT, json=chat_body(modalities=None, n=2)).json()
    first, second = body["choices"]
    assert (first["index"], first["finish_reason"]) == (0, "stop")
    assert first["message"] == {"role": "assistant", "content": "Paris.", "reasoning_content": "Let me see."}
    assert (second["index"], second["finish_reason"]) == (1, "length")
    assert second["message"] == {"role": "assistant", "content": "It is Lyon"}
    assert body["seed"] == 11
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "total_tokens": 14,
        "completion_tokens_details": {"image_tokens": 0, "text_tokens": 9, "reasoning_tokens": 4},
    }


def test_remote_images_can_be_switched_off() -> None:
    app = create_app(dataclasses.replace(SETTINGS, fetch_remote=False), FakeClient())
    messages = [{"role": "user", "content": [image_part("http://127.0.0.1/cat.png")]}]
    reply = TestClient(app).post(CHAT, json=chat_body(messages=messages))
    assert reply.status_code == 400
    assert "this server fetches none; allowed: a data: URL" in reply.json()["error"]["message"]


def test_the_reply_names_the_model_that_was_asked_for() -> None:
    name = "ByteDance-Seed/BAGEL-7B-MoT"
    assert http(FakeClient()).post(CHAT, json=chat_body(model=name)).json()["model"] == name


def test_another_model_is_not_found_and_the_served_ones_are_named() -> None:
    reply = http(FakeClient()).post(CHAT, json=chat_body(model="gpt-9"))
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["message"] == "model='gpt-9' is not allowed; allowed: bagel, ByteDance-Seed/BAGEL-7B-MoT"


def test_the_clients_trace_goes_on_to_triton_and_none_of_its_other_headers() -> None:
    client = FakeClient()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with http(client) as proxy:
        proxy.post(CHAT, json=chat_body(), headers={"Traceparent": parent, "tracestate": "a=1", "x-request-id": "mine"})
        other = {"traceparent": "nonsense", "tracestate": "a=1", "x-request-id": "yours", "authorization": "b"}
        proxy.post(CHAT, json=chat_body(), headers=other)
    assert client.headers == [
        {"traceparent": parent, "tracestate": "a=1", "x-request-id": "mine"},
        {"x-request-id": "yours"},
    ]


def test_the_connection_is_given_back_at_the_end() -> None:
    client = FakeClient()
    with http(client):
        assert not client.closed
    assert client.closed
