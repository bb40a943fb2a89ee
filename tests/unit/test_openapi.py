"""The API's description of itself."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import pytest
from PIL import Image
from proxy_fake import CHAT, NAMES, SETTINGS, FakeClient, chat_body
from proxy_fake import http as api
from starlette.routing import Route
from starlette.testclient import TestClient

from bagel_triton.openai.app import create_app
from bagel_triton.openai.settings import HttpOptions


@pytest.fixture(scope="module")
def document() -> Any:
    return api(FakeClient()).get("/openapi.json").json()


def test_every_endpoint_is_described_and_none_that_is_not_there(document: Any) -> None:
    routes = [route for route in create_app(SETTINGS, FakeClient()).routes if isinstance(route, Route)]
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described == served - {("/", "get")}


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for item in node for found in references(item)] if isinstance(node, list) else []

    for reference in references(document):
        target = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def test_bodies_say_what_is_accepted(document: Any) -> None:
    schemas = document["components"]["schemas"]
    chat, images = schemas["ChatBody"]["properties"], schemas["ImagesBody"]["properties"]
    assert {"type": "string"} in chat["stop"]["anyOf"]
    assert chat["modalities"]["anyOf"][0]["items"] == {"enum": ["text", "image"]}
    assert chat["guidance_scale"]["anyOf"] == chat["cfg_text_scale"]["anyOf"]
    # A field has limits where it has an effect.
    assert {"type": "integer", "minimum": 16, "multipleOf": 16} in images["height"]["anyOf"]
    assert {"type": "integer"} in chat["height"]["anyOf"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in chat["temperature"]["anyOf"]
    assert {"type": "number"} in images["temperature"]["anyOf"]
    assert chat["tools"]["enum"] == [[], "", None]
    assert "user" in chat
    assert schemas["ImagesBody"]["properties"]["model"]["anyOf"][0] == {"enum": list(NAMES)}
    assert "mask" not in schemas["EditsForm"]["properties"]


def test_its_examples_are_accepted(document: Any) -> None:
    schemas = document["components"]["schemas"]
    [url] = schemas["ImageUrl"]["properties"]["url"]["examples"]
    part = {"type": "image_url", "image_url": {"url": url}}
    client = FakeClient()
    edit = {
        "prompt": "x",
        "image": url,
        "size": schemas["JsonEditsBody"]["properties"]["size"]["anyOf"][0]["examples"][0],
    }
    assert api(client).post("/v1/images/edits", json=edit).status_code == 200
    assert api(client).post(CHAT, json=chat_body(messages=[{"role": "user", "content": [part]}])).status_code == 200
    first, second = (request.image for request in client.requests)
    assert first == second
    assert first is not None
    assert Image.open(io.BytesIO(first[0])).size == (1, 1)


def test_keys_are_described_if_there_are_any(document: Any) -> None:
    assert "security" not in document
    settings = dataclasses.replace(SETTINGS, http=HttpOptions(api_keys=("k",)))
    client = TestClient(create_app(settings, FakeClient()))
    described = client.get("/openapi.json").json()  # it and /docs are open, as vLLM's are
    assert described["security"] == [{"key": []}]
    assert client.get("/docs").status_code == 200
    needs_key = {path: client.get(path).status_code == 401 for path in described["paths"]}
    for path, methods in described["paths"].items():
        assert all((operation.get("security") != []) == needs_key[path] for operation in methods.values()), path
    assert needs_key[CHAT]
    assert needs_key["/metrics"]


def test_the_page_of_the_docs_needs_nothing_from_elsewhere() -> None:
    reply = api(FakeClient()).get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    assert "POST /v1/images/edits" in reply.text
    assert "num_inference_steps" in reply.text
    assert not re.search(r"https?://|<script", reply.text)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
