"""Remote images of a request, through the proxy on a real port."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from proxy_fake import FakeClient, chat_body, image_part, live_proxy

from tests.support.image_host import BODY, PUBLIC, Host, serving_images


@pytest.fixture
def host() -> Iterator[Host]:
    with serving_images() as serving:
        yield serving


def test_a_request_may_name_remote_images(host: Host) -> None:
    urls = ("http://images.example/cat.png", "data:image/png;base64,QQ==", "http://images.example/absolute")
    status, backend, reply = ask(host, *urls)
    assert status == 200, reply
    assert backend.requests[0].image == (BODY, b"A", BODY)


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("loopback", "127.0.0.1 has the address 127.0.0.1; allowed: public addresses"),
        ("inside", "inside.example has the address 10.0.0.8; allowed: public addresses"),
    ],
)
def test_a_remote_image_that_leads_inside_fails_the_request_as_openai_does(host: Host, path: str, cause: str) -> None:
    status, backend, reply = ask(host, "http://images.example/cat.png", f"http://images.example/{path}")
    param = "messages[0].content[1].image_url"
    message = f"{param}='http://images.example/{path}' cannot be fetched: {cause}"
    assert status == 400
    assert reply["error"].pop("request_id")
    assert reply == {
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": "invalid_request"}
    }
    assert {path for _, path in host.seen} <= {"/cat.png", f"/{path}"}
    assert set(host.reached) == {PUBLIC}
    assert backend.requests == []  # it is never left out


def ask(host: Host, *urls: str) -> tuple[int, FakeClient, dict[str, dict[str, str]]]:
    """Status and reply to a request with images, and the backend that it may have reached."""
    backend = FakeClient()
    body = chat_body(messages=[{"role": "user", "content": [image_part(url) for url in urls]}])
    with live_proxy(backend, host.remote()) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
    return reply.status_code, backend, reply.json()
