"""Models, health, metrics, wrong paths: what is around the generating endpoints."""

from __future__ import annotations

import dataclasses
import http.server
import threading
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from proxy_fake import CHAT, NAMES, SETTINGS, FakeClient, chat_body
from proxy_fake import http as api
from starlette.testclient import TestClient

import bagel_triton
from bagel_triton.deploy.topology import BAGEL
from bagel_triton.openai.app import create_app
from bagel_triton.protocol import errors
from bagel_triton.protocol.sleep import SleepState


def test_the_model_is_listed_once_with_its_modalities() -> None:
    [model] = api(FakeClient()).get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["aliases"]) == (NAMES[0], "model", list(NAMES[1:]))
    assert model["max_model_len"] == 4096
    assert model["architecture"]["input_modalities"] == ["text", "image"]
    assert model["architecture"]["output_modalities"] == ["text", "image"]


@pytest.mark.parametrize("name", NAMES)  # one holds a slash
def test_every_name_of_the_model_can_be_looked_up(name: str) -> None:
    model = api(FakeClient()).get(f"/v1/models/{name}").json()
    assert (model["id"], model["root"], model["max_model_len"]) == (name, NAMES[0], 4096)


def test_another_model_is_not_found() -> None:
    reply = api(FakeClient()).get("/v1/models/gpt-9")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/ping"])
def test_it_is_ready_only_when_every_model_is(path: str) -> None:
    reply = api(FakeClient()).get(path)
    assert (reply.status_code, reply.json()["status"]) == (200, "ready")
    assert set(reply.json()["models"]) == set(BAGEL.models)
    assert "replicas" not in reply.json()

    client = FakeClient()
    client.replicas = {"10.0.0.2:8093": "ready", "10.0.0.3:8093": "draining"}
    assert api(client).get(path).json()["replicas"] == client.replicas

    reply = api(FakeClient(ready=dict.fromkeys(BAGEL.models, True) | {"dit": False})).get(path)
    assert (reply.status_code, reply.json()["message"]) == (503, "not ready: dit")

    reply = api(FakeClient(ready=errors.StageUnavailable("Triton is away"))).get(path)
    assert (reply.status_code, reply.json()["message"]) == (503, "Triton is away")
    assert not any(reply.json()["models"].values())


@pytest.mark.parametrize("state", ["draining", "drained"])
def test_a_balancer_leaves_a_server_that_drains(state: Literal["draining", "drained"]) -> None:
    client = FakeClient()
    client.asleep = SleepState(state, 0, "refuse")
    for path, status in (("/health/ready", 503), ("/health", 200), ("/health/live", 200)):
        assert api(client).get(path).status_code == status
    assert api(client).get("/health/ready").json()["status"] == state


def test_it_is_live_while_triton_is_away() -> None:
    assert api(FakeClient(ready=errors.StageUnavailable("away"))).get("/health/live").status_code == 200


def test_its_version() -> None:
    assert api(FakeClient()).get("/version").json() == {"version": bagel_triton.__version__}


@pytest.mark.parametrize("path", ["/health", "/health/live", "/v1/models", "/version", "/metrics"])
def test_head_has_the_status_and_no_body(path: str) -> None:
    reply = api(FakeClient()).head(path)
    assert (reply.status_code, reply.content) == (200, b"")


@pytest.fixture
def triton_page() -> Iterator[str]:
    """The URL of a metrics page like Triton's."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"nv_inference_count 3\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()
        thread.join()


def test_tritons_metrics_and_the_apis_own_are_one_page(triton_page: str) -> None:
    client = TestClient(create_app(dataclasses.replace(SETTINGS, metrics_url=triton_page), FakeClient()))
    client.post(CHAT, json=chat_body())
    client.post("/v1/no/such/path")
    lines = client.get("/metrics").text.splitlines()
    assert "nv_inference_count 3" in lines
    assert f'bagel_http_requests_total{{endpoint="{CHAT}",method="POST",status="200"}} 1.0' in lines
    assert 'bagel_http_requests_total{endpoint="other",method="other",status="404"} 1.0' in lines
    assert "bagel_http_requests_active 1.0" in lines  # this one


def test_the_apis_metrics_are_there_without_tritons() -> None:
    gone = dataclasses.replace(SETTINGS, metrics_url="http://127.0.0.1:1/metrics")
    page = TestClient(create_app(gone, FakeClient())).get("/metrics")
    assert page.status_code == 200
    assert "# Triton's metrics at http://127.0.0.1:1/metrics cannot be had" in page.text
    assert "bagel_http_requests_active 1.0" in page.text


@pytest.mark.parametrize(
    ("method", "path", "advice"),
    [
        ("POST", "/chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "//v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("POST", "/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("POST", "/openai/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("GET", "/models", "did you mean /v1/models?"),
        ("GET", "/v1/models/", "did you mean /v1/models?"),
        ("GET", "/v1/health", "did you mean /health?"),
        ("POST", "/v1/completions", "use POST /v1/chat/completions"),
        ("POST", "/completions", "use POST /v1/chat/completions"),
        ("POST", "/v1/embeddings", "this model makes no embeddings"),
        ("POST", "/v1/audio/speech", "this model has no audio"),
        ("POST", "/v1/images/variations", "use POST /v1/images/edits"),
        ("POST", "/v1/messages", "use POST /v1/chat/completions"),
        ("POST", "/api/chat", "use POST /v1/chat/completions"),
        ("POST", "/v1/omni/sleep", "use POST /v1/sleep"),
        ("POST", "/v1/omni/wakeup", "use POST /v1/wake"),
        ("POST", "/v1/chat/completions/batch", "send each conversation to POST /v1/chat/completions"),
        ("GET", "/v1", "the endpoints are POST /v1/chat/completions"),
        ("GET", "/healthz", "use GET /health"),
        ("GET", "/favicon.ico", "GET /docs lists the endpoints"),
    ],
)
def test_a_wrong_path_says_where_to_go(method: str, path: str, advice: str) -> None:
    reply = api(FakeClient()).request(method, f"http://testserver{path}")
    assert reply.status_code == 404
    assert advice in reply.json()["error"]["message"]


def test_a_request_id_is_taken_unless_it_would_break_a_line() -> None:
    client = api(FakeClient())
    assert client.get("/version", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    for unfit in ("a b", "x" * 129, "<script>", ""):
        made = client.get("/version", headers={"x-request-id": unfit}).headers["x-request-id"]
        assert made != unfit
        assert made.startswith("req_")
