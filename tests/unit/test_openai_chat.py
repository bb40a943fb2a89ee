from __future__ import annotations

import base64
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
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
from bagel_triton.openai.settings import HttpOptions
from bagel_triton.protocol.events import AnswerEvent, TokenLogprob
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.triton.client import StageResponse


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
    assert choice["message"]["images"] == [part]
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


OPENAI_SDK = {"user-agent": "OpenAI/Python 3.57.0", "x-stainless-lang": "python"}
RAW = {"x-stainless-raw-response": "true"}


@pytest.mark.parametrize(
    ("headers", "fields", "members"),
    [
        ({"user-agent": "python-requests/2.32"}, {}, "both"),
        ({"user-agent": "curl/8"}, {}, "both"),
        (OPENAI_SDK, {}, "both"),
        (OPENAI_SDK | RAW, {"stream": False}, "both"),  # LangChain
        (OPENAI_SDK | RAW, {}, "images"),  # LiteLLM
        ({"user-agent": "litellm/1.110.2"}, {}, "images"),
        ({"user-agent": "aiperf/1.0"}, {"stream": False}, "images"),
        ({"user-agent": "ai/5.0.277 ai-sdk/openai-compatible/1.0.61 runtime/node.js/22"}, {}, "images"),
        ({"user-agent": "ai-sdk/openai-compatible/1.0.61 ai-sdk/provider-utils/3.0.20"}, {}, "images"),
        ({"user-agent": "OpenAI/Go 3.2.0", "x-stainless-lang": "go"}, {}, "images"),
        ({"user-agent": "OpenAI/Java 4.3.0", "x-stainless-lang": "java"}, {}, "images"),
        ({"user-agent": "OpenAI/JS 6.9.0", "x-stainless-lang": "js"}, {}, "both"),
        ({"user-agent": "openai-compatible/1.0"}, {}, "both"),
        ({"user-agent": "litellm/1.110.2"}, {"image_reply": "both"}, "both"),
        ({}, {"image_reply": "images"}, "images"),
        ({}, {"image_reply": "list"}, "list"),
        ({}, {"extra_body": {"image_reply": "list"}}, "list"),
    ],
)
def test_images_are_where_the_client_reads_them(
    headers: dict[str, str], fields: dict[str, object], members: str
) -> None:
    body = http(FakeClient(*THOUGHT_IMAGES)).post(CHAT, json=chat_body(**fields), headers=headers).json()
    message = body["choices"][0]["message"]
    assert (message["content"] == "") == (members == "images")
    assert ("images" in message) == (members != "list")
    images = message["content"] or message["images"]
    assert [(image["index"], image["seed"]) for image in images] == [(0, 7), (1, 8)]


def test_the_server_may_say_where_images_are() -> None:
    settings = dataclasses.replace(SETTINGS, http=HttpOptions(image_reply="list"))
    client = TestClient(create_app(settings, FakeClient()))
    message = client.post(CHAT, json=chat_body()).json()["choices"][0]["message"]
    assert "images" not in message
    message = client.post(CHAT, json=chat_body(image_reply="images")).json()["choices"][0]["message"]
    assert message["content"] == ""


def test_log_probabilities_are_in_openais_shape() -> None:
    top = (TokenLogprob("Paris", (80, 97), -0.1), TokenLogprob("Lyon", (76,), -2.5))
    tokens = (TokenLogprob("Paris", (80, 97), -0.1, top),)
    script = (StageResponse(AnswerEvent(0, "Paris", "", "stop", tokens)), ONE_ANSWER[-1])
    fields = {"modalities": ["text"], "logprobs": True, "top_logprobs": 2}
    choice = http(FakeClient(*script)).post(CHAT, json=chat_body(**fields)).json()["choices"][0]
    shown = {"token": "Paris", "bytes": [80, 97], "logprob": -0.1}
    assert choice["logprobs"] == {
        "content": [{**shown, "top_logprobs": [shown, {"token": "Lyon", "bytes": [76], "logprob": -2.5}]}],
        "refusal": None,
    }


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
