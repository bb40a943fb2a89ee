"""Connections that misbehave: slow, silent, gone, or with very large bodies."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import gzip
import json
import os
import random
import re
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import uvicorn
from proxy_fake import CHAT, ONE_ANSWER, PROGRESS, SETTINGS, FakeClient, chat_body, image_part
from starlette.testclient import TestClient

from bagel_triton.openai import chat, endpoint, http_server
from bagel_triton.openai.app import create_app
from bagel_triton.openai.settings import HttpOptions
from bagel_triton.protocol.events import ImageEvent
from bagel_triton.protocol.request import GenerationRequest
from bagel_triton.triton.client import StageResponse
from tests.support.waiting import soon


class EndlessClient(FakeClient):
    """Streams progress, or images of ``side`` pixels, until it is closed; knows how many it serves."""

    def __init__(self, side: int = 0) -> None:
        super().__init__()
        self.active, self.sent, self._side = 0, 0, side

    async def generate(
        self, request: GenerationRequest, request_id: str, headers: Mapping[str, str]
    ) -> AsyncGenerator[StageResponse, None]:
        self.active += 1
        pixels = np.random.default_rng(1).integers(0, 256, (self._side, self._side, 3), dtype=np.uint8)
        try:
            while True:
                yield StageResponse(ImageEvent(0, self._side, self._side, 1), pixels) if self._side else PROGRESS[0]
                self.sent += 1
                await asyncio.sleep(0.005)
        finally:
            self.active -= 1


@contextlib.contextmanager
def served(client: FakeClient, options: HttpOptions, **settings: Any) -> Iterator[str]:
    """The URL of an API with these options."""
    [listener] = http_server.listen("127.0.0.1", 0)
    app = create_app(dataclasses.replace(SETTINGS, http=options, **settings), client)
    server = uvicorn.Server(http_server.config(app, options, grace_s=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    with listener:
        thread.start()
        try:
            yield http_server.base_url(listener, options)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def raw_request(url: str, body: bytes = b'{"messages":[{"role":"user","content":"x"}],"stream":true}') -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connection(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def get_version(kept: socket.socket) -> None:
    """One request and its whole reply, on a connection that stays open."""
    kept.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
    reply = b""
    while not reply.endswith(b"}"):
        reply += kept.recv(1000)
    assert b"200 OK" in reply


def test_fifty_streams_whose_clients_leave_leave_nothing_behind() -> None:
    backend, chance = EndlessClient(), random.Random(7)

    async def stream(client: httpx.AsyncClient) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.uniform(0, 1.0)):
                async with client.stream("POST", CHAT, json=chat_body(stream=chance.random() < 0.8)) as reply:
                    async for _ in reply.aiter_bytes():
                        pass

    async def leave() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, trust_env=False, timeout=30) as client:
            await asyncio.gather(*(stream(client) for _ in range(50)))

    with served(backend, HttpOptions()) as url:
        asyncio.run(leave())
        assert soon(lambda: backend.active == 0)
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert "bagel_http_requests_active 1.0" in metrics  # this one
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


def test_a_client_that_does_not_read_is_not_sent_more_and_is_dropped_in_the_end() -> None:
    backend = EndlessClient(side=256)
    with served(backend, HttpOptions(write_timeout_s=1)) as url, connection(url) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(
            raw_request(url, b'{"messages":[{"role":"user","content":"x"}],"modalities":["image"],"stream":true}')
        )
        assert soon(lambda: backend.active == 1)
        assert httpx.get(f"{url}/version", trust_env=False).status_code == 200  # others go on
        assert soon(lambda: backend.active == 0)
        assert backend.sent < 500


def test_a_header_that_does_not_end_closes_the_connection() -> None:
    with served(FakeClient(), HttpOptions(header_timeout_s=1)) as url:
        for beginning in (b"", b"GET /version HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with connection(url) as slow:
                slow.sendall(beginning)
                with contextlib.suppress(ConnectionResetError):
                    assert slow.recv(100) == b""


def test_a_body_of_two_lengths_is_refused_and_its_connection_closed() -> None:
    head = b"POST /ping HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with served(FakeClient(), HttpOptions()) as url, connection(url) as smuggling:
        smuggling.sendall(head + b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        smuggling.settimeout(10)
        answer = b"".join(iter(lambda: smuggling.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"allowed: one of them" in answer


def exchanged(url: str, *pieces: bytes) -> bytes:
    """The server's bytes in reply to ``pieces``, until it closes the connection."""
    with connection(url) as client:
        with contextlib.suppress(ConnectionError):  # it need not read on once it has refused
            for piece in pieces:
                client.sendall(piece)
        return b"".join(iter(lambda: client.recv(10_000), b""))


def test_a_whole_url_is_a_target_like_its_path() -> None:
    """RFC 9112, section 3.2.2; its host is that of the request, not the header's."""
    head = b" HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n"
    with served(FakeClient(), HttpOptions()) as url:
        for target in (b"http://proxy/version", b"HTTP://proxy:1/version?x=1", b"https://proxy/%76ersion"):
            assert b"200 OK" in exchanged(url, b"GET " + target + head)
        assert b"text/html" in exchanged(url, b"GET http://proxy" + head)
        assert b"did you mean /v1/models?" in exchanged(url, b"GET http://proxy/models" + head)
        drawn = b'{"prompt":"a cat","response_format":"url"}'
        length = f"\r\nContent-Length: {len(drawn)}\r\n\r\n".encode()
        target = b"POST http://proxy/v1/images/generations" + head.removesuffix(b"\r\n\r\n") + length
        assert b'"url":"http://proxy/v1/images/files/' in exchanged(url, target + drawn)


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        (
            [b"GET /version HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n"],
            431,
            "allowed: at most 65536",
        ),
        ([b"GET /version HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 70_000], 431, "allowed: at most 65536"),
        ([b"GET /version?" + b"x" * 66_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"], 431, "allowed: at most 65536"),
        ([b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"], 400, "is not HTTP/1.1: illegal request line"),
        ([b"GET /version\r\n\r\n"], 400, "is not HTTP/1.1: illegal request line: 'GET /version'"),
        ([b"GET /version HTTP/1.1\r\nHost: x\r\n" + b"x" * 50_000 + b"\r\n\r\n"], 400, "xxx..."),
        ([b"GET /version HTTP/1.1\r\n\r\n"], 400, "is not HTTP/1.1: Missing mandatory Host: header"),
        (
            [b"POST /ping HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"],
            501,
            "Only Transfer-Encoding: chunked",
        ),
        (
            [f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode()],
            400,
            "chunk header",
        ),
    ],
)
def test_what_is_not_http_is_refused_in_the_shape_of_every_error(
    pieces: list[bytes], status: int, message: str
) -> None:
    with served(FakeClient(), HttpOptions()) as url:
        head, _, body = exchanged(url, *pieces).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


def test_every_request_on_a_connection_is_answered_in_order() -> None:
    """In one packet or many, after a refusal, and after a line that a client puts behind a body."""
    get, end = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with served(FakeClient(*ONE_ANSWER), HttpOptions()) as url:
        chat_request, refused = (
            raw_request(url, b'{"messages":[{"role":"user","content":"x"}]}'),
            raw_request(url, b"{"),
        )
        replies = exchanged(url, chat_request + refused + get + chat_request + end)
        assert re.findall(rb"HTTP/1.1 (\d+)", replies) == [b"200", b"400", b"200", b"200", b"200"]
        with connection(url) as kept:
            for _ in range(2):
                get_version(kept)
                kept.sendall(b"\r\n")


def test_a_second_request_on_a_connection_has_its_own_time_for_its_header() -> None:
    with served(FakeClient(), HttpOptions(header_timeout_s=1)) as url, connection(url) as kept:
        get_version(kept)
        kept.sendall(b"GET /ver")
        with contextlib.suppress(ConnectionResetError):
            assert kept.recv(100) == b""


def test_a_body_that_does_not_end_is_answered() -> None:
    with served(FakeClient(), HttpOptions(body_timeout_s=1)) as url, connection(url) as slow:
        slow.sendall(raw_request(url)[:-5])
        assert b"408 Request Timeout" in slow.recv(1000)


def test_an_idle_connection_is_kept_as_long_as_asked() -> None:
    for keep_alive_s, kept in ((1, False), (90, True)):
        with served(FakeClient(), HttpOptions(keep_alive_s=keep_alive_s)) as url, connection(url) as idle:
            get_version(idle)
            idle.settimeout(2)
            if kept:
                with pytest.raises(TimeoutError):
                    idle.recv(100)
            else:
                assert idle.recv(100) == b""


def test_bodies_that_are_being_received_share_a_budget() -> None:
    """A body over it is refused until the others have been parsed; what one took is given back however it ends."""
    options = HttpOptions(max_receiving_mib=1)
    body = b'{"messages":[{"role":"user","content":"' + b"x" * 600_000 + b'"}]}'
    with served(FakeClient(*ONE_ANSWER), options, max_body_bytes=1_000_000) as url, contextlib.ExitStack() as held:
        slow = held.enter_context(connection(url))
        slow.sendall(raw_request(url, body)[:-5])
        small = {"url": f"{url}{CHAT}", "json": chat_body(modalities=["text"]), "trust_env": False}
        assert soon(lambda: httpx.post(f"{url}{CHAT}", content=body, trust_env=False).status_code == 429)
        refused = httpx.post(f"{url}{CHAT}", content=body, trust_env=False)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        assert httpx.post(**small).status_code == 200
        slow.sendall(body[-5:])
        assert b"200 OK" in slow.recv(1000)
        gone = held.enter_context(connection(url))
        gone.sendall(raw_request(url, body)[:-5])
        gone.close()
        assert soon(lambda: httpx.post(f"{url}{CHAT}", content=body, trust_env=False).status_code == 200)


IMAGES = [os.urandom(300_000), b"a small one", os.urandom(200_001)]
LARGE = dataclasses.replace(SETTINGS, max_body_bytes=10_000_000)


@pytest.mark.parametrize("alphabet", ["standard", "url-safe", "escaped", "unpadded"])
def test_large_images_arrive_whole_in_every_encoding(alphabet: str) -> None:
    backend = FakeClient()
    encoded = [base64.b64encode(image).decode() for image in IMAGES]
    if alphabet == "url-safe":
        encoded = [base64.urlsafe_b64encode(image).decode() for image in IMAGES]
    if alphabet == "unpadded":
        encoded = [text.rstrip("=") for text in encoded]
    parts = [image_part(f"data:image/png;base64,{text}") for text in encoded]
    body = httpx.Request("POST", "http://x", json=chat_body(messages=[{"role": "user", "content": parts}])).content
    if alphabet == "escaped":
        body = body.replace(b"/", b"\\/")
    TestClient(create_app(LARGE, backend)).post(CHAT, content=body)
    assert backend.requests[0].image == tuple(IMAGES)


@pytest.mark.parametrize("at", [100_000, 2**17 - 2])
@pytest.mark.parametrize("damage", ["!!", "==", "+_"])
def test_a_large_image_that_is_damaged_is_refused_by_name(damage: str, at: int) -> None:
    text = base64.b64encode(IMAGES[0]).decode()
    damaged = f"data:image/png;base64,{text[:at]}{damage}{text[at + 2 :]}"
    body = chat_body(messages=[{"role": "user", "content": [image_part(damaged)]}])
    reply = TestClient(create_app(LARGE, FakeClient())).post(CHAT, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[0].content[0].image_url"


def test_a_body_of_millions_of_values_is_refused_before_they_are_made() -> None:
    client = TestClient(create_app(LARGE, FakeClient()))
    long = chat_body(messages=[{"role": "user", "content": 'a[],{}\\"' * 60_000}])
    assert client.post(CHAT, json=long).status_code == 200
    reply = client.post(CHAT, content=b'{"metadata":[' + b"[]," * 300_000 + b"[]]}")
    assert reply.status_code == 400
    assert "bytes outside its texts; allowed: at most 524288" in reply.json()["error"]["message"]


def test_a_compressed_body_is_refused_by_name() -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    reply = TestClient(create_app(LARGE, FakeClient())).post(CHAT, content=gzip.compress(b"{}"), headers=headers)
    assert reply.status_code == 415
    assert reply.json()["error"]["param"] == "content-encoding"


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
def test_a_body_without_compression_may_say_so(encoding: str) -> None:
    reply = TestClient(create_app(LARGE, FakeClient())).post(
        CHAT, json=chat_body(), headers={"content-encoding": encoding}
    )
    assert reply.status_code == 200


def test_only_large_data_urls_leave_the_body() -> None:
    small = b'{"a": "data:x;base64,QUJD", "b": ";base64,", "c": "' + b"x" * 300_000 + b'"}'
    assert endpoint.detach(bytearray(small)) == (small, {})
    unended = b'{"a": "data:x;base64,' + b"QUJD" * 100_000
    assert endpoint.detach(bytearray(unended)) == (unended, {})


def test_a_large_body_is_parsed_once_and_not_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other requests' events would wait for it."""
    on_the_loop: list[bool] = []
    parse = chat.parse

    def watched(data: bytes) -> Any:
        on_the_loop.append(asyncio._get_running_loop() is not None)
        return parse(data)

    monkeypatch.setattr(chat, "parse", watched)
    body = chat_body(messages=[{"role": "user", "content": "x" * 2 * endpoint.LARGE_BODY}], modalities=["text"])
    reply = TestClient(create_app(LARGE, FakeClient(*ONE_ANSWER))).post(CHAT, json=body)
    assert reply.status_code == 200
    assert on_the_loop == [False]
