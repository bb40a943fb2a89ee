from __future__ import annotations

import argparse
import signal
import socket

import httpx
import pytest

from bagel_triton.serving import CommandError, machine, proxy
from tests.support.proxy_process import proxy_process
from tests.support.triton_service import TritonService, serving
from tests.support.waiting import soon

CHAT = "/v1/chat/completions"


def run(*args: str) -> int:
    parser = argparse.ArgumentParser()
    proxy.add_arguments(parser)
    return proxy.run(parser.parse_args(args))


def test_a_busy_port_is_named_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port}: Address already in use") as caught:
            run("--port", str(port))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--port", "70000"), "--port=70000 is not allowed"),
        (("--max-body-mib", "0"), "--max-body-mib=0 is not allowed"),
        (("--triton-grpc", "localhost"), "allowed: HOST:PORT of Triton's gRPC, such as localhost:8001"),
        (("--triton-grpc", ":8001"), "--triton-grpc=:8001 is not allowed"),
        (("--triton-grpc", "http://localhost"), "--triton-grpc=http://localhost is not allowed"),
        (("--triton-grpc", "localhost:grpc"), "--triton-grpc=localhost:grpc is not allowed"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(args: tuple[str, ...], text: str) -> None:
    with pytest.raises(CommandError, match=text):
        run(*args)


def test_it_is_healthy_once_the_triton_of_a_stage_0_is_there_and_while_all_of_its_models_are() -> None:
    triton, port = TritonService(), machine.choose_ports({"--triton-grpc-port": 0})["--triton-grpc-port"]
    with proxy_process("--triton-grpc", f"127.0.0.1:{port}") as (_, url):

        def health() -> httpx.Response:
            return httpx.get(f"{url}/health", timeout=30, trust_env=False)

        assert health().json()["models"] == {"bagel": False}
        triton.ready = {"cfg_expand", "thinker", "bagel"}
        with serving(triton, f"127.0.0.1:{port}"):
            assert soon(lambda: health().status_code == 200)
            assert health().json()["models"] == {"cfg_expand": True, "thinker": True, "bagel": True}
            triton.ready, triton.unloaded = {"bagel"}, {"cfg_expand", "thinker"}
            assert health().json()["message"] == "not ready: cfg_expand, thinker"
            triton.ready, triton.unloaded = set(), set()
            assert health().json()["message"] == "not ready: bagel"


def test_it_serves_without_triton_and_stops_on_sigterm() -> None:
    with proxy_process("--triton-grpc", "127.0.0.1:1", "--no-remote-images") as (process, url):
        health = httpx.get(f"{url}/health", timeout=30, trust_env=False)
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]
        refused = httpx.post(url + CHAT, json={"messages": messages}, timeout=30, trust_env=False)
        waiting = [{"role": "user", "content": "Hi"}]
        unavailable = httpx.post(url + CHAT, json={"messages": waiting}, timeout=30, trust_env=False)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=15)
    assert health.status_code == 503
    assert "Triton at 127.0.0.1:1 cannot be reached" in health.json()["message"]
    assert "this server fetches none" in refused.json()["error"]["message"]
    assert unavailable.status_code == 503
    refusal, access, outage, _ = errors.splitlines()  # no traceback
    assert "400 InvalidRequest: messages[0].content[0].image_url='http://127.0.0.1/' is a remote" in refusal
    assert f"400 POST {CHAT}" in access
    assert refused.headers["x-request-id"] in refusal
    assert refused.headers["x-request-id"] in access
    assert "503 StageUnavailable: Triton at 127.0.0.1:1 cannot be reached" in outage
