"""Fetching from a real HTTP server, which stands behind invented public addresses."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from proxy_fake import FakeClient, chat_body, live_proxy, picture_part

from bagel_triton.proxy.fetch import FetchError, RemotePictures

BODY = bytes(range(256)) * 40
PUBLIC, DEAD = "93.184.216.34", "93.184.216.35"
NAMES = {
    "pictures.example": [PUBLIC],
    "half-dead.example": [DEAD, PUBLIC],
    "inside.example": ["10.0.0.8"],
    "half-inside.example": [PUBLIC, "127.0.0.1"],
}
REDIRECTS = {
    "/absolute": "http://pictures.example/cat.png",
    "/relative": "cat.png?size=1",
    "/loopback": "http://127.0.0.1:{port}/cat.png",
    "/inside": "//inside.example/cat.png",
    "/file": "file:///etc/passwd",
    "/3": "/2",
    "/2": "/1",
    "/1": "/cat.png",
    "/4": "/3",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        if target := REDIRECTS.get(path):
            self.reply(302, Location=target.format(port=self.server.server_port))  # type: ignore[attr-defined]
        elif path == "/cat.png":
            self.reply(200)
            self.wfile.write(BODY)
        elif path == "/gzip":
            self.reply(200, **{"Content-Encoding": "gzip"})
        elif path == "/endless":
            self.reply(200)
            for _ in range(1000):
                self.wfile.write(BODY)
        elif path == "/slow":
            self.reply(200)
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        elif path == "/broken":
            self.reply(200, **{"Content-Length": "1000000"})
            self.wfile.write(BODY)
        else:
            self.reply(404)

    def reply(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


class Host(ThreadingHTTPServer):
    """The server; ``seen`` are the host and path of each request, ``reached`` the addresses connected to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []
        self.reached: list[str] = []
        self.resolved: list[str] = []
        self.names = dict(NAMES)

    def handle_error(self, *args: object) -> None:
        pass  # a client that leaves early is part of the tests

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        return self.names.get(host, [host])

    def connect(self) -> httpx.AsyncBaseTransport:
        return Wire(self)

    def remote(self, **limits: float) -> RemotePictures:
        return RemotePictures(self.resolve, self.connect, **limits)  # type: ignore[arg-type]


class Wire(httpx.AsyncHTTPTransport):
    """Leads every public address to the host, so that only it is ever connected to."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self._host = host

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._host.reached.append(request.url.host)
        port = 1 if request.url.host == DEAD else self._host.server_port
        request.url = request.url.copy_with(host="127.0.0.1", port=port)
        return await super().handle_async_request(request)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(host: Host, url: str, **limits: float) -> bytes:
    return asyncio.run(host.remote(**limits).fetch(url))


def refusal(host: Host, url: str, **limits: float) -> str:
    with pytest.raises(FetchError) as caught:
        fetch(host, url, **limits)
    return str(caught.value)


def test_a_picture_is_fetched_by_its_hosts_name_from_the_address_that_was_checked(host: Host) -> None:
    assert fetch(host, "http://pictures.example:8080/cat.png?v=2#top") == BODY
    assert host.seen == [("pictures.example:8080", "/cat.png?v=2")]
    assert host.reached == [PUBLIC]


@pytest.mark.parametrize("path", ["absolute", "relative", "3"])
def test_redirects_are_followed(host: Host, path: str) -> None:
    assert fetch(host, f"http://pictures.example/{path}") == BODY


def test_an_address_that_does_not_answer_is_passed_over(host: Host) -> None:
    assert fetch(host, "http://half-dead.example/cat.png") == BODY
    assert host.reached == [DEAD, PUBLIC]


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1/cat.png", "127.0.0.1 has the address 127.0.0.1; allowed: public addresses"),
        ("http://user@127.0.0.1/cat.png", "has the address 127.0.0.1"),
        ("http://[::ffff:127.0.0.1]/cat.png", "has the address ::ffff:127.0.0.1"),
        ("http://inside.example/cat.png", "inside.example has the address 10.0.0.8"),
        ("http://half-inside.example/cat.png", "half-inside.example has the address 127.0.0.1"),
        ("http:///cat.png", "the URL names no host"),
        ("http://pictures.example:99999/", "port 99999 does not exist"),
        ("http://pictures.example:0/", "port 0 does not exist"),
        ("http://pictures.example:http/", "the URL is malformed"),
    ],
)
def test_nothing_is_connected_to_where_nobody_is_let(host: Host, url: str, cause: str) -> None:
    assert cause in refusal(host, url)
    assert host.reached == []


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("loopback", "127.0.0.1 has the address 127.0.0.1"),
        ("inside", "inside.example has the address 10.0.0.8"),
        ("file", "it leads to a file URL; allowed: http, https"),
    ],
)
def test_a_redirect_leads_no_further_than_a_url(host: Host, path: str, cause: str) -> None:
    assert cause in refusal(host, f"http://pictures.example/{path}")
    assert host.seen == [("pictures.example", f"/{path}")]


def test_a_name_that_changes_its_address_is_checked_anew(host: Host) -> None:
    async def resolve(name: str, port: int) -> list[str]:
        host.resolved.append(name)
        return [PUBLIC] if len(host.resolved) == 1 else ["127.0.0.1"]

    host.resolve = resolve  # type: ignore[method-assign]
    assert "has the address 127.0.0.1" in refusal(host, "http://pictures.example/absolute")
    assert host.reached == [PUBLIC]
    assert host.resolved == ["pictures.example"] * 2


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("4", "it is redirected more than 3 times"),
        ("missing.png", "the host answered 404 Not Found"),
        ("gzip", "the host sent it with Content-Encoding gzip"),
        ("broken", "the connection failed: "),
    ],
)
def test_what_goes_wrong_is_named(host: Host, path: str, cause: str) -> None:
    assert cause in refusal(host, f"http://pictures.example/{path}")


def test_too_many_bytes_are_not_read(host: Host) -> None:
    assert fetch(host, "http://pictures.example/cat.png", max_bytes=len(BODY)) == BODY
    assert "allowed: at most 10239" in refusal(host, "http://pictures.example/cat.png", max_bytes=len(BODY) - 1)
    assert "too many bytes" in refusal(host, "http://pictures.example/endless", max_bytes=100_000)


def test_a_slow_host_is_given_up(host: Host) -> None:
    started = time.monotonic()
    assert refusal(host, "http://pictures.example/slow", timeout_s=0.3) == "it took longer than 0.3 s"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://localhost/", "localhost has the address "),
        ("http://2130706433/", "has the address 127.0.0.1"),
        ("https://[::1]/", "::1 has the address ::1"),
        ("http://a..b/", "the name a..b cannot be resolved"),
    ],
)
def test_the_systems_own_names_are_checked(url: str, cause: str) -> None:
    with pytest.raises(FetchError) as caught:
        asyncio.run(RemotePictures().fetch(url))
    assert cause in str(caught.value)


def test_a_request_may_name_remote_pictures(host: Host) -> None:
    urls = ("http://pictures.example/cat.png", "data:image/png;base64,QQ==", "http://pictures.example/absolute")
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
def test_a_remote_picture_that_leads_inside_fails_the_request_as_openai_does(host: Host, path: str, cause: str) -> None:
    status, backend, reply = ask(host, "http://pictures.example/cat.png", f"http://pictures.example/{path}")
    param = "messages[0].content[1].image_url"
    message = f"{param}='http://pictures.example/{path}' cannot be fetched: {cause}"
    assert status == 400
    assert reply == {
        "error": {"message": message, "type": "invalid_request_error", "param": param, "code": "invalid_request"}
    }
    assert {path for _, path in host.seen} <= {"/cat.png", f"/{path}"}
    assert set(host.reached) == {PUBLIC}
    assert backend.requests == []  # it is never left out


def ask(host: Host, *urls: str) -> tuple[int, FakeClient, dict[str, dict[str, str]]]:
    """Status and reply to a request with pictures, and the backend that it may have reached."""
    backend = FakeClient()
    body = chat_body(messages=[{"role": "user", "content": [picture_part(url) for url in urls]}])
    with live_proxy(backend, host.remote()) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False)
    return reply.status_code, backend, reply.json()
