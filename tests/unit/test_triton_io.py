"""Responses of the Triton models, with a stand-in for Triton's own module."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest


@dataclass
class FakeSender:
    """Records the outputs of each response."""

    sent: list[list[str]] = field(default_factory=list)

    def send(self, *response: Any, flags: int = 0) -> None:
        self.sent += [[tensor.name for tensor in one.tensors] for one in response]


@dataclass
class FakeRequest:
    """A request for the outputs ``requested``; for all of them where that is empty."""

    requested: list[str]
    sender: FakeSender = field(default_factory=FakeSender)

    def request_id(self) -> str:
        return "r1"

    def requested_output_names(self) -> list[str]:
        return self.requested

    def get_response_sender(self) -> FakeSender:
        return self.sender


@pytest.fixture
def triton_io(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pb_utils = SimpleNamespace(
        Tensor=lambda name, array: SimpleNamespace(name=name, array=array),
        InferenceResponse=lambda tensors, error=None: SimpleNamespace(tensors=tensors),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "bagel_triton.triton.io", raising=False)
    yield importlib.import_module("bagel_triton.triton.io")
    del sys.modules["bagel_triton.triton.io"]


def sent(triton_io: ModuleType, requested: list[str]) -> list[list[str]]:
    request, outbox = FakeRequest(requested), triton_io.Outbox()
    reply = triton_io.Reply(request, outbox)
    reply.send({"event": np.zeros(1)})
    reply.finish({"thinker_output": np.zeros(1), "denoise_job": np.zeros(1)})
    outbox.close()
    return request.sender.sent


def test_a_response_has_only_the_outputs_that_were_requested(triton_io: ModuleType) -> None:
    assert sent(triton_io, ["thinker_output"]) == [["thinker_output"]]
    assert sent(triton_io, ["event", "denoise_job"]) == [["event"], ["denoise_job"]]


def test_a_request_that_names_no_output_gets_all(triton_io: ModuleType) -> None:
    assert sent(triton_io, []) == [["event"], ["thinker_output", "denoise_job"]]


def test_a_send_that_does_not_return_is_found(triton_io: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_io, "SEND_S", 0.1)
    found, returns = threading.Event(), threading.Event()
    outbox = triton_io.Outbox(found.set)
    outbox.put(returns.wait)
    assert found.wait(60)
    returns.set()
    outbox.close()


def test_sends_that_return_are_not_taken_for_one_that_does_not(
    triton_io: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_io, "SEND_S", 0.5)
    found = threading.Event()
    outbox = triton_io.Outbox(found.set)
    for _ in range(12):
        outbox.put(lambda: time.sleep(0.1))
    outbox.close()
    assert not found.is_set()
