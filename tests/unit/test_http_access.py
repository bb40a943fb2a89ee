"""Keys, CORS, sockets, TLS and the options that set them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest
from proxy_fake import CHAT, SETTINGS, FakeClient, chat_body
from starlette.testclient import TestClient

from bagel_triton.openai import http_server
from bagel_triton.openai.app import create_app
from bagel_triton.openai.settings import HttpOptions, OptionError, add_arguments, http_options
from bagel_triton.protocol.errors import Asleep
from tests.support.proxy_process import proxy_process

KEYS = ("first-key", "second-key")


def parsed(*args: str) -> HttpOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return http_options(parser.parse_args(args))


def api(options: HttpOptions) -> TestClient:
    return TestClient(create_app(dataclasses.replace(SETTINGS, http=options), FakeClient()))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_the_api(key: str) -> None:
    client = api(HttpOptions(api_keys=KEYS))
    for scheme in ("Bearer", "bearer"):
        reply = client.post(CHAT, json=chat_body(), headers={"Authorization": f"{scheme} {key}"})
        assert reply.status_code == 200


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "an API key is required"),
        ({"Authorization": "Bearer first-ke"}, "the API key is not valid"),
        ({"Authorization": "Bearer "}, "the API key is not valid"),
        ({"Authorization": "Bearer first-keysecond-key"}, "the API key is not valid"),
        ({"Authorization": "Basic first-key"}, "the API key is not valid"),
        ({"Authorization": b"Bearer \xff\xfe"}, "the API key is not valid"),
    ],
)
def test_other_requests_are_refused_in_openais_shape(headers: dict[str, str], problem: str) -> None:
    client = api(HttpOptions(api_keys=KEYS))
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/no/such/path")):
        reply = client.request(method, path, headers=headers)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        error = reply.json()["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert error["message"].startswith(problem)
        assert error["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/ping"])
def test_health_needs_no_key(path: str) -> None:
    assert api(HttpOptions(api_keys=KEYS)).get(path).status_code == 200


def test_keys_come_from_flags_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nfrom-file\n\nfrom-file-2\n")
    monkeypatch.setenv("BAGEL_API_KEY", "from-environment")
    options = parsed("--api-key", "key-1", "--api-key", "key-2", "--api-key-file", str(file))
    assert set(options.api_keys) == {"key-1", "key-2", "from-environment", "from-file", "from-file-2"}
    assert "key-1" not in repr(options)


def test_bad_options_are_refused_and_no_key_is_shown(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# none\n")
    for args, message in (
        (("--api-key", "se cret"), "--api-key holds an empty key or a blank"),
        (("--api-key-file", str(tmp_path / "absent")), "cannot be read"),
        (("--api-key-file", str(empty)), "holds no key"),
        (("--cors-origin", "app.example"), "--cors-origin=app.example is not allowed"),
        (("--timeout-body", "0"), "--timeout-body=0 is not allowed"),
        (("--max-receiving-mib", "63"), "--max-receiving-mib=63 is not allowed; allowed: at least --max-body-mib, 64"),
        (("--ssl-keyfile", "key.pem"), "--ssl-keyfile is given without --ssl-certfile"),
        (("--ssl-certfile", str(tmp_path / "absent")), "is not a file"),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            parsed(*args)
        assert "se cret" not in str(caught.value)


PREFLIGHT = {
    "Origin": "http://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("origin", ["http://app.example", "*"])
def test_pages_of_an_allowed_origin_may_call_the_api(origin: str) -> None:
    client = api(HttpOptions(cors_origins=(origin,), api_keys=KEYS))
    preflight = client.options(CHAT, headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] in (origin, "http://app.example")
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    refused = client.post(CHAT, json=chat_body(), headers={"Origin": "http://app.example"})
    assert refused.status_code == 401  # readable by the page
    assert "access-control-allow-origin" in refused.headers
    assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()


def test_pages_of_other_origins_may_not() -> None:
    reply = api(HttpOptions(cors_origins=("http://other.example",))).options(CHAT, headers=PREFLIGHT)
    assert "access-control-allow-origin" not in reply.headers
    assert "access-control-allow-origin" not in api(HttpOptions()).options(CHAT, headers=PREFLIGHT).headers


def test_localhost_is_served_at_each_of_its_addresses() -> None:
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(listener) for listener in http_server.listen("localhost", 0)]
        assert len({listener.getsockname()[1] for listener in listeners}) == 1
        for listener in listeners:
            with socket.create_connection(listener.getsockname()[:2], timeout=5):
                pass


def test_a_busy_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"localhost \(127\.0\.0\.1\) port {port}: Address already in use; --port chooses another"
        with pytest.raises(OptionError, match=message):
            http_server.listen("localhost", port)


@pytest.mark.parametrize("host", ["not-an-address", "203.0.113.7"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(OptionError, match=f"cannot listen on {host}"):
        http_server.listen(host, 0)


def test_a_warning_where_other_machines_reach_an_api_without_a_key() -> None:
    with contextlib.ExitStack() as held:
        [everywhere] = [held.enter_context(listener) for listener in http_server.listen("0.0.0.0", 0)]
        [here] = [held.enter_context(listener) for listener in http_server.listen("127.0.0.1", 0)]
        assert "is open to every machine" in (http_server.exposure([everywhere], HttpOptions()) or "")
        assert http_server.exposure([everywhere], HttpOptions(api_keys=KEYS)) is None
        assert http_server.exposure([here], HttpOptions()) is None
        assert http_server.base_url(everywhere, HttpOptions()).startswith("http://127.0.0.1:")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 and its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    try:
        subprocess.run(
            [*command, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both


def test_it_is_served_over_https(certificate: Path) -> None:
    with proxy_process("--triton-grpc", "127.0.0.1:1", "--ssl-certfile", str(certificate)) as (_, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{url}/health/live", verify=context, trust_env=False).status_code == 200


def test_a_certificate_without_its_key_is_refused(certificate: Path) -> None:
    alone = certificate.parent / "cert.pem"
    with pytest.raises(OptionError, match="--ssl-certfile"):
        http_server.check_tls(HttpOptions(ssl_certfile=str(alone)))


ADMIN = {"Authorization": "Bearer admin"}
WITH_ADMIN = HttpOptions(api_keys=KEYS, admin_api_keys=("admin",))


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/sleep"), ("POST", "/v1/wake"), ("GET", "/v1/sleep"), ("POST", "/sleep"), ("POST", "/wake_up")],
)
def test_only_an_admin_key_opens_sleep_and_wake(method: str, path: str) -> None:
    client = api(WITH_ADMIN)
    for headers in ({}, {"Authorization": "Bearer first-key"}):
        assert client.request(method, path, headers=headers).status_code == 401
    assert client.request(method, path, headers=ADMIN).status_code == 200
    assert client.get("/v1/models", headers=ADMIN).status_code == 401  # it opens nothing else
    closed = api(HttpOptions()).request(method, path)
    assert closed.status_code == 403
    assert "start it with --admin-api-key" in closed.json()["error"]["message"]


def test_sleep_wake_and_health_in_between() -> None:
    fake = FakeClient()
    client = TestClient(create_app(dataclasses.replace(SETTINGS, http=WITH_ADMIN), fake))
    asleep = {"state": "asleep", "level": 2, "while_asleep": "wait"}
    for given in ({"json": {"level": 2}}, {"params": {"level": "2"}}):
        assert client.post("/v1/sleep", headers=ADMIN, **given).json() == asleep  # type: ignore[arg-type]
    assert client.get("/is_sleeping", headers=ADMIN).json() == {"is_sleeping": True}
    reply = client.get("/health/ready")
    assert (reply.status_code, reply.json()["status"]) == (200, "asleep")
    fake.while_asleep = "refuse"
    client.post("/sleep", headers=ADMIN)
    statuses = [client.get(path).status_code for path in ("/health", "/health/ready", "/health/live")]
    assert statuses == [200, 503, 200]
    assert client.post("/wake_up", headers=ADMIN).json()["state"] == "awake"
    assert client.get("/health/ready").json()["status"] == "ready"
    assert [(call.action, call.level) for call in fake.sleeps if call.action == "sleep"] == [
        ("sleep", 2), ("sleep", 2), ("sleep", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"level": 3}', "level=3 is not allowed; allowed: 1"),
        ('{"level": true}', "level=true is not allowed"),
        ('{"levle": 1}', "levle is not a known field; did you mean level?"),
        ("[]", "body=[] is not allowed; allowed: a JSON object"),
        ("{", "the body is not JSON"),
    ],
)
def test_other_bodies_of_a_sleep_are_refused(body: str, message: str) -> None:
    reply = api(WITH_ADMIN).post("/v1/sleep", headers=ADMIN, content=body)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/sleep?mode=abort", "/sleep?levle=2", "/wake_up?tags=weights"])
def test_other_parameters_of_a_sleep_are_refused(path: str) -> None:
    reply = api(WITH_ADMIN).post(path, headers=ADMIN)
    assert reply.status_code == 400
    assert "is not a parameter of" in reply.json()["error"]["message"]


def test_a_client_cannot_make_up_methods_in_the_metrics() -> None:
    client = api(HttpOptions())
    for number in range(5):
        client.request(f"ZZ{number}", "/health/live")
    page = client.get("/metrics").text
    assert "ZZ" not in page
    assert 'endpoint="/health/live",method="other",status="405"' in page


def test_a_sleeping_server_that_refuses_says_when_to_try_again() -> None:
    client = TestClient(create_app(SETTINGS, FakeClient(Asleep("the server is asleep; try again later"))))
    reply = client.post(CHAT, json=chat_body())
    assert (reply.status_code, reply.headers["retry-after"], reply.json()["error"]["code"]) == (503, "1", "asleep")
