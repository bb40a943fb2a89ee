"""Adapters as a client and an operator name them: in a body, in ``/v1/models``, on the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from proxy_fake import CHAT, NAMES, SCRIPT, SETTINGS, FakeClient, chat_body
from starlette.testclient import TestClient

from bagel_triton.deploy import yaml as deploy_yaml
from bagel_triton.openai.app import create_app
from bagel_triton.openai.settings import HttpOptions
from bagel_triton.protocol.adapters import AdapterCall
from bagel_triton.protocol.errors import ModelNotFound
from bagel_triton.serving import CommandError, flags, serve
from tests.unit.test_lora import TINY, write_adapter
from tests.unit.test_serving_flags import parse

ADAPTERS = ("style", "a/b")
ADMIN = {"Authorization": "Bearer admin"}


def api(client: FakeClient, *admin_keys: str) -> TestClient:
    """The proxy of a server that has those adapters."""
    client.loaded = client.loaded or [*ADAPTERS]
    settings = dataclasses.replace(SETTINGS, lora_modules=ADAPTERS, http=HttpOptions(admin_api_keys=admin_keys))
    return TestClient(create_app(settings, client))


@pytest.mark.parametrize(
    ("fields", "model", "lora"),
    [
        ({}, NAMES[0], None),
        ({"model": NAMES[1]}, NAMES[1], None),
        ({"model": "style"}, "style", "style"),
        ({"model": "bagel:a/b"}, "bagel:a/b", "a/b"),
        ({"lora": "style"}, NAMES[0], "style"),
        ({"lora": {}}, NAMES[0], None),
        ({"model": "style", "extra_body": {"lora": "style"}}, "style", "style"),
    ],
)
def test_a_request_names_an_adapter(fields: dict[str, object], model: str, lora: str | None) -> None:
    client = FakeClient(*SCRIPT)
    reply = api(client).post(CHAT, json=chat_body(**fields))
    assert (reply.status_code, reply.json()["model"]) == (200, model)
    assert client.requests[0].lora == lora


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {"prompt": "A cute cat", "model": "style"}),
        ("/v1/responses", {"input": "hi", "model": "bagel:style"}),
    ],
)
def test_other_endpoints_take_it_as_the_model_too(path: str, body: dict[str, object]) -> None:
    client = FakeClient(ModelNotFound("lora='style' is not allowed; allowed: none", "lora"))
    reply = api(client).post(path, json=body)
    assert client.requests[0].lora == "style"
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert reply.json()["error"]["message"].startswith("model='style' is not allowed")


@pytest.mark.parametrize("model", ["styl", "bagel:styl", "other:style", ":style"])
def test_an_unknown_one_is_not_found(model: str) -> None:
    reply = api(FakeClient()).post(CHAT, json=chat_body(model=model))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert reply.json()["error"]["message"].endswith("allowed: bagel, ByteDance-Seed/BAGEL-7B-MoT, style, a/b")


def test_two_adapters_are_one_too_many() -> None:
    reply = api(FakeClient()).post(CHAT, json=chat_body(model="style", lora="a/b"))
    assert (reply.status_code, reply.json()["error"]["message"]) == (
        400,
        "lora and model are both given, with the values 'a/b' and 'style'; allowed: one of them",
    )


def test_they_are_listed_below_the_model() -> None:
    listed = api(FakeClient()).get("/v1/models").json()["data"]
    assert {model["id"]: model["parent"] for model in listed} == {"bagel": None, "style": "bagel", "a/b": "bagel"}
    assert api(FakeClient()).get("/v1/models/a/b").json()["parent"] == "bagel"


@pytest.mark.parametrize(
    "written",
    ["[a=x, b=y/z]", "{a: x, b: y/z}", "[{name: a, path: x}, b=y/z]"],
)
def test_a_file_has_several_forms(written: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(f"lora_modules: {written}\nenable_lora: true\nmax_loras: 4\nmax_lora_rank: 64\n")
    config = deploy_yaml.load(path, "checkpoint")
    assert (config.lora_modules, config.max_loras, config.max_lora_rank) == ({"a": "x", "b": "y/z"}, 4, 64)


def test_a_flag_has_several_adapters() -> None:
    args = parse(["--lora-modules", "a=x", '{"name": "b", "path": "y"}', "--enable-lora", "--max-lora-rank", "64"])
    assert deploy_yaml.resolve(None, "checkpoint", flags.flags_of(args)).config.lora_modules == {"a": "x", "b": "y"}


def test_a_wrong_adapter_ends_the_start(tmp_path: Path) -> None:
    folder, _ = write_adapter(tmp_path / "other")
    config = deploy_yaml.DeployConfig(str(TINY), lora_modules={"a": str(folder)})
    with pytest.raises(CommandError, match=r"^--lora-modules: .* adapts connector\.fc2, which an adapter of requests"):
        serve._check_adapters(config)


def test_a_default_that_no_request_could_have_ends_the_start(tmp_path: Path) -> None:
    config = deploy_yaml.DeployConfig(str(TINY), image_defaults={"lora": "style"})
    with pytest.raises(CommandError, match=r"^default_sampling_params\.lora='style' is not allowed; allowed: none"):
        serve._check_adapters(config)
    serve._check_adapters(msgspec.structs.replace(config, lora_dir=str(tmp_path)))  # it may be loaded later


def test_an_adapter_comes_and_goes() -> None:
    client = FakeClient(*SCRIPT)
    proxy, other = api(client, "admin"), api(client)
    body = {"lora_name": "new", "lora_path": "new-folder"}
    reply = proxy.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert client.adapter_calls == [AdapterCall("load", "new", "new-folder")]
    for one in (proxy, other):  # a proxy that did not load it learns of it from the server
        assert one.post(CHAT, json=chat_body(model="new")).status_code == 200
        assert [model["id"] for model in one.get("/v1/models").json()["data"]] == ["bagel", *ADAPTERS, "new"]
    assert [request.lora for request in client.requests] == ["new", "new"]
    reply = proxy.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=ADMIN)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert proxy.post(CHAT, json=chat_body(model="new")).status_code == 404
    assert [model["id"] for model in other.get("/v1/models").json()["data"]] == ["bagel", *ADAPTERS]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "bagel", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "bagel:style", "lora_path": "x"}, "lora_name"),  # as which requests name ``style``
        ({"lora_name": " x", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": 1}, "lora_path"),
        ({"lora_name": "x", "lora_path": "x", "load_inplace": True}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "x", "other": 1}, "other"),
        ([], "body"),
    ],
)
def test_a_wrong_load_is_refused_by_name(body: object, param: str) -> None:
    client = FakeClient()
    reply = api(client, "admin").post("/v1/load_lora_adapter", json=body, headers=ADMIN)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not client.adapter_calls


def test_only_an_admin_key_opens_it() -> None:
    body = {"lora_name": "new", "lora_path": "x"}
    assert api(FakeClient()).post("/v1/load_lora_adapter", json=body).status_code == 403
    assert api(FakeClient(), "admin").post("/v1/load_lora_adapter", json=body).status_code == 401
