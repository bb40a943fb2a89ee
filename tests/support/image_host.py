"""A real HTTP server that stands behind invented public addresses."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from bagel_triton.openai.image_fetch import RemoteImages

BODY = bytes(range(256)) * 40
PUBLIC, DEAD = "93.184.216.34", "93.184.216.35"
NAMES = {
    "images.example": [PUBLIC],
    "half-dead.example": [DEAD, PUBLIC],
    "inside.example": ["10.0.0.8"],
    "half-inside.example": [PUBLIC, "127.0.0.1"],
}
REDIRECTS = {
    "/absolute": "http://images.example/cat.png",
    "/relative": "cat.png?size=1",
    "/loopback": "http://127.0.0.1:{port}/cat.png",
    "/inside": "//inside.example/cat.png",
    "/file": "file:///etc/passwd",
    "/away": "http://half-dead.example/cat.png",
    "/3": "/2",
    "/2": "/1",
    "/1": "/cat.png",
    "/4": "/3",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        self.server.headers.append(dict(self.headers))  # type: ignore[attr-defined]
        if target := REDIRECTS.get(path):
            self.reply(302, Location=target.format(port=self.server.server_port))  # type: ignore[attr-defined]
        elif path == "/cat.png":
            self.reply(200)
            self.wfile.write(BODY)
        elif path == "/identity":
            self.reply(200, **{"Content-Encoding": "Identity"})
            self.wfile.write(BODY)
        elif path == "/forbidden":
            self.reply(403, **{"Content-Type": "text/html; charset=utf-8"})
            page = "<html><head><title>x</title></head><body>Please set a <b>User-Agent</b> &amp; wait</body>"
            self.wfile.write(page.encode())
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
    """The server; ``seen`` and ``headers`` are each request's, ``reached`` the addresses connected to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
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

    def remote(self, **limits: Any) -> RemoteImages:
        return RemoteImages(self.resolve, self.connect, **limits)


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


@contextlib.contextmanager
def serving_images() -> Iterator[Host]:
    """A host that serves until the block ends."""
    with Host() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
