"""What a client is told, and what is logged, when a request fails."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from proxy_fake import (
    CHAT,
    DONE,
    IMAGE,
    ONE_ANSWER,
    PNG_URL,
    PROGRESS,
    THOUGHT_IMAGES,
    FakeClient,
    chat_body,
    http,
    image_part,
    live_proxy,
)
from tritonclient.utils import InferenceServerException

from bagel_triton.openai.errors import MAX_LOGGED
from bagel_triton.protocol import errors
from tests.support.waiting import soon


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.InvalidRequest("height=7 is not allowed", "height"), 400, "invalid_request_error", "invalid_request"),
        (errors.Overloaded("the pool is full"), 429, "rate_limit_error", "overloaded"),
        (errors.DeadlineExceeded("too late"), 504, "timeout_error", "deadline_exceeded"),
        (errors.StageUnavailable("dit died"), 503, "service_unavailable_error", "stage_unavailable"),
        (errors.LeaseError("stale"), 503, "service_unavailable_error", "lease_error"),
        (ZeroDivisionError("division by zero"), 500, "server_error", "internal"),
    ],
)
def test_an_error_before_the_first_event_has_its_status_and_openais_shape(
    error: Exception, status: int, kind: str, code: str, stream: bool
) -> None:
    reply = http(FakeClient(error)).post(CHAT, json=chat_body(stream=stream))
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert ("retry-after" in reply.headers) == (status == 429)
    expected = str(error) if isinstance(error, errors.BagelError) else f"ZeroDivisionError: {error}"
    param = "height" if status == 400 else None
    assert reply.json() == {
        "error": {
            "message": expected,
            "type": kind,
            "param": param,
            "code": code,
            "request_id": reply.headers["x-request-id"],
        }
    }


@pytest.mark.parametrize("param", ["Overloaded(): x", "a\nb(c)", "image[0]"])
def test_an_error_is_read_back_whatever_its_field_is_called(param: str) -> None:
    error = errors.from_text(f"in ensemble 'x', {errors.InvalidRequest('no such thing', param).to_text()}")
    assert isinstance(error, errors.InvalidRequest)
    assert error.message == "no such thing"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("The stream is no longer in valid state, the error detail is reported through provided callback.", 503),
        ("[StatusCode.UNAVAILABLE] Socket closed", 503),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", 503),
        ("[StatusCode.INTERNAL] a defect", 500),
    ],
)
def test_a_stage_that_meets_a_server_being_stopped_is_unavailable(text: str, status: int) -> None:
    error = errors.from_text(errors.from_exception(InferenceServerException(text)).to_text())
    reply = http(FakeClient(error)).post(CHAT, json=chat_body())
    assert reply.status_code == status
    assert text in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "kind", "allowed"),
    [
        (CHAT, "multipart/form-data; boundary=x", "allowed: application/json"),
        (CHAT, "application/xml", "allowed: application/json"),
        ("/v1/images/edits", "application/x-www-form-urlencoded", "allowed: application/json or multipart/form-data"),
    ],
)
def test_a_body_that_is_not_json_is_told_by_its_content_type(path: str, kind: str, allowed: str) -> None:
    """curl sends JSON as application/x-www-form-urlencoded, so only the body itself decides."""
    client = http(FakeClient())
    assert client.post(CHAT, json=chat_body(), headers={"content-type": kind}).status_code == 200
    error = client.post(path, content="prompt=cat", headers={"content-type": kind}).json()["error"]
    assert error["message"].endswith(f"its content-type is '{kind}'; {allowed}")
    assert error["code"] == "invalid_request"


def test_half_a_character_in_an_error_is_escaped() -> None:
    """A body is refused before its surrogates are looked for; no reply can hold one."""
    error = http(FakeClient()).post(CHAT, content=rb'{"\ud800": 1, "\ud800": 2}').json()["error"]
    assert error["param"] == "\\ud800"
    assert error["message"].startswith("\\ud800 is given 2 times")


def test_an_error_after_some_progress_still_has_its_status_without_streaming() -> None:
    reply = http(FakeClient(*PROGRESS, errors.Overloaded("full"))).post(CHAT, json=chat_body())
    assert reply.status_code == 429


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "param", "message"),
    [
        (
            errors.InvalidRequest("image[1] is damaged: truncated", "image[1]"),
            "messages[2].content[0].image_url",
            "messages[2].content[0].image_url is damaged: truncated",
        ),
        (
            errors.InvalidRequest("max_tokens=0 is not allowed", "max_tokens"),
            "max_completion_tokens",
            "max_completion_tokens=0 is not allowed",
        ),
        (
            errors.InvalidRequest("height=7 is not allowed", "height"),
            "extra_body.height",
            "extra_body.height=7 is not allowed",
        ),
        (
            errors.InvalidRequest("messages[2].content='' is not allowed", "messages[2].content"),
            "messages[2].content",
            "messages[2].content='' is not allowed",
        ),
    ],
)
def test_what_a_stage_refuses_is_named_as_it_was_written(
    error: errors.InvalidRequest, param: str, message: str, stream: bool
) -> None:
    body = chat_body(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "What?"}, image_part(PNG_URL)]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": [image_part(PNG_URL)]},
        ],
        max_completion_tokens=0,
        extra_body={"height": 7},
        stream=stream,
    )
    reply = http(FakeClient(error)).post(CHAT, json=body)
    assert reply.status_code == 400
    assert (reply.json()["error"]["param"], reply.json()["error"]["message"]) == (param, message)


def test_the_next_good_request_works_after_any_bad_one() -> None:
    client = http(FakeClient(*ONE_ANSWER))
    for url in (PNG_URL[:-3], "file:///etc/passwd", "http://127.0.0.1/", "http://localhost:1/x", "data:,x"):
        messages = [{"role": "user", "content": [image_part(url)]}]
        reply = client.post(CHAT, json={"messages": messages})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "messages[0].content[0].image_url"
        assert client.post(CHAT, json={"messages": [{"role": "user", "content": "Hi"}]}).status_code == 200


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (errors.InvalidRequest("no\n\x1b[31mroot", "height"), "WARNING 400 InvalidRequest: no  [31mroot"),
        (errors.StageUnavailable("dit died\nAt:\n x"), "ERROR 503 StageUnavailable: dit died At:  x"),
        (errors.Internal("x" * 5000), "ERROR 500 Internal: " + "x" * (MAX_LOGGED - len("Internal: "))),
    ],
)
def test_a_typed_error_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture, error: errors.BagelError, line: str
) -> None:
    http(FakeClient(error)).post(CHAT, json=chat_body())
    [record] = [record for record in caplog.records if record.name.startswith("bagel_triton")]
    assert f"{record.levelname} {logging.Formatter().format(record)}" == line


def test_a_client_that_leaves_while_it_sends_its_request_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = FakeClient()
    with live_proxy(backend) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: 5000\r\n\r\n{")
            time.sleep(0.2)
        assert soon(lambda: bool(caplog.records))
    assert [(record.levelname, record.getMessage(), record.exc_info) for record in caplog.records] == [
        ("WARNING", "499 Cancelled: the client left while it sent the request", None)
    ]
    assert not backend.requests


def test_a_defect_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    http(FakeClient(ZeroDivisionError("oops"))).post(CHAT, json=chat_body())
    assert "Traceback" in caplog.text
    assert "ZeroDivisionError: oops" in caplog.text


@pytest.mark.parametrize(
    ("script", "modality", "missing"),
    [
        ((*PROGRESS, DONE), "image", "without an image"),
        ((*PROGRESS, IMAGE), "image", "without an image"),
        ((*THOUGHT_IMAGES[:3], DONE), "image", "without an image"),
        ((*ONE_ANSWER[:2], DONE), "text", "without an answer"),
        (ONE_ANSWER[:3], "text", "without an answer"),
    ],
)
def test_a_reply_that_lacks_something_is_an_error_not_an_empty_reply(
    script: tuple[object, ...], modality: str, missing: str
) -> None:
    reply = http(FakeClient(*script)).post(CHAT, json=chat_body(modalities=[modality]))
    assert reply.status_code == 500
    assert missing in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"{nope", b'{"seed": ' + b"9" * 5000 + b"}", b'{"n": 1,}', b'{"n": "\xe9"}', b"[" * 9999]
)
def test_a_body_that_is_not_json_is_refused(content: bytes) -> None:
    reply = http(FakeClient()).post(CHAT, content=content)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("the body is not JSON")
    assert "sys." not in reply.json()["error"]["message"]


def _in_pieces() -> Iterator[bytes]:
    for _ in range(20):
        yield b"x" * 1000


@pytest.mark.parametrize("content", [b"x" * 10_001, _in_pieces()], ids=["with length", "chunked"])
def test_a_body_over_the_limit_is_refused(content: bytes | Iterator[bytes]) -> None:
    reply = http(FakeClient()).post(CHAT, content=content)
    assert reply.status_code == 413
    assert reply.json()["error"]["message"] == "the body is too large; allowed: at most 10000 bytes"


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", CHAT, 405, "GET /v1/chat/completions: Method Not Allowed; allowed: POST"),
        ("POST", "/health", 405, "allowed: "),
    ],
)
def test_the_router_refuses_in_the_same_shape(method: str, path: str, status: int, text: str) -> None:
    reply = http(FakeClient()).request(method, path)
    assert reply.status_code == status
    assert text in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"
