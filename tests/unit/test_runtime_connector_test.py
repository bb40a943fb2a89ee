"""The start-up test's way through Triton's HTTP: what the thinker answers is what the DiT is given."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bagel_triton.runtime import connector_test
from bagel_triton.runtime.command_error import CommandError


class Triton(ThreadingHTTPServer):
    """Answers ``generate`` of each model with what a test put in ``answers``: status and body."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[str, tuple[int, dict[str, str]]] = {
            "/v2/models/thinker/generate": (200, {"model_name": "thinker", "selftest": "a lease"}),
            "/v2/models/dit/generate": (200, {"model_name": "dit", "selftest": "shm"}),
        }


class _Handler(BaseHTTPRequestHandler):
    server: Triton

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        status, answer = self.server.answers[self.path]
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def triton() -> Iterator[Triton]:
    with Triton() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _check(triton: Triton) -> str:
    return asyncio.run(connector_test.check(triton.server_port))


def test_the_dit_reads_what_the_thinker_lent(triton: Triton) -> None:
    assert _check(triton) == "shm"
    assert [body for _, body in triton.asked] == [{"selftest": "lend"}, {"selftest": "a lease"}]
    assert [path.split("/")[3] for path, _ in triton.asked] == ["thinker", "dit"]


def test_a_stages_error_is_the_reason_given(triton: Triton) -> None:
    triton.answers["/v2/models/dit/generate"] = (400, {"error": "LeaseError(): read 3 of 240 numbers wrong"})
    with pytest.raises(CommandError, match=r"self-test failed at dit: LeaseError\(\): read 3 of 240 numbers wrong"):
        _check(triton)


def test_an_answer_without_a_lease_fails(triton: Triton) -> None:
    triton.answers["/v2/models/thinker/generate"] = (200, {"model_name": "thinker"})
    with pytest.raises(CommandError, match="self-test failed at thinker"):
        _check(triton)


def test_no_answer_fails(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector_test, "TIMEOUT_S", 1.0)
    triton.shutdown()
    with pytest.raises(CommandError, match="self-test failed at thinker: ReadTimeout"):
        _check(triton)
