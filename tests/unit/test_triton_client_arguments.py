"""The Triton clients' arguments: where the server is, and what is asked of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from bagel_triton.protocol.request import GenerationRequest

CLIENTS = Path(__file__).parents[2] / "client"
GRPC, HTTP = "triton_grpc_client", "triton_http_client"


@pytest.fixture
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of the parameter's name, which finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(CLIENTS)
    return importlib.import_module(request.param)


@pytest.mark.parametrize(
    ("client", "text", "meant"),
    [
        (GRPC, "localhost:8001", "localhost:8001"),
        (GRPC, "http://triton.example:8001/", "triton.example:8001"),
        (GRPC, "grpc://[::1]:8001", "[::1]:8001"),
        (HTTP, "localhost:8000", "http://localhost:8000"),
        (HTTP, "[::1]:8000", "http://[::1]:8000"),
        (HTTP, "HTTP://localhost:8000/", "http://localhost:8000"),
        (HTTP, "https://example.com/triton/", "https://example.com/triton"),
    ],
    indirect=["client"],
)
def test_a_server_is_named_by_its_address_or_its_url(client: ModuleType, text: str, meant: str) -> None:
    assert client.arguments(["--server", text]).server == meant


@pytest.mark.parametrize("client", [GRPC, HTTP], indirect=True)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "8001",
        "localhost:x",
        "localhost:70000",
        "::1:8001",
        "[::1:8001",
        "ftp://localhost:80",
        "a b:1",
        "http://h:70000",
        "a..b:1",
    ],
)
def test_what_names_no_server_is_refused_with_the_forms_there_are(
    client: ModuleType, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        client.main(["--server", text])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --server/-s: {text!r} is not allowed; allowed: HOST:PORT, " in last


@pytest.mark.parametrize(
    ("client", "text", "allowed"),
    [
        (GRPC, "https://localhost:8001", "HOST:PORT, grpc://HOST:PORT, http://HOST:PORT; there is no TLS"),
        (GRPC, "http://localhost", "HOST:PORT, grpc://HOST:PORT, http://HOST:PORT; there is no TLS"),
        (GRPC, "http://localhost:8001/v2", "HOST:PORT, grpc://HOST:PORT, http://HOST:PORT; there is no TLS"),
        (HTTP, "grpc://localhost:8001", "HOST:PORT, http://HOST:PORT, https://HOST:PORT"),
    ],
    indirect=["client"],
)
def test_what_one_protocol_has_and_the_other_has_not_is_refused(
    client: ModuleType, text: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        client.main(["--server", text])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"argument --server/-s: {text!r} is not allowed; allowed: {allowed}\n")


@pytest.mark.parametrize("client", [GRPC, HTTP], indirect=True)
def test_the_request_has_only_what_was_given(client: ModuleType) -> None:
    args = client.arguments(["--think", "--max-think-tokens", "9", "--cache", "taylorseer"])
    request = importlib.import_module("triton_task").generation_request(args)
    assert request == GenerationRequest(prompt="A cute cat", think=True, max_think_tokens=9, cache="taylorseer")


@pytest.mark.parametrize("client", [GRPC, HTTP], indirect=True)
def test_a_server_that_is_not_there_is_one_line(client: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["--server", "http://127.0.0.1:1"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "127.0.0.1:1: " in line


@pytest.mark.parametrize("client", [GRPC, HTTP], indirect=True)
def test_the_ensemble_takes_no_thinking(client: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        client.main(["--model", "bagel_text2img", "--max-think-tokens", "9"])
    assert ended.value.code == 2
    assert "--model bagel_text2img takes no --max-think-tokens" in capsys.readouterr().err
