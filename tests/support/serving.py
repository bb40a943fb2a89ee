"""A whole server, as ``bagel-triton serve`` starts it, and plain clients of it."""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from PIL import Image

from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest
from bagel_triton.protocol.tensors import Arrays, to_tensors

START_S, STOP_S, ANSWER_S = 180, 15, 120
ENDLESS_TEXT = {  # what was said becomes so likely that nothing else is: it runs to its limit, nearly all of the pool
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "modalities": ["text"],
    "max_tokens": 3000,
    "n": 10,
    "temperature": 1.0,
    "repetition_penalty": 0.01,
}


class Server:
    """A running server. ``grpc``, ``http`` and ``metrics`` are Triton's addresses, ``url`` the proxy's.

    ``prefix`` is a command that runs another, which stands behind it.
    """

    def __init__(
        self,
        checkpoint: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        start_s: float = START_S,
    ) -> None:
        program = Path(sys.executable).with_name("bagel-triton")  # which is not there where a path leads to the package
        command = [program] if program.exists() else [sys.executable, "-m", "bagel_triton"]
        self.process = subprocess.Popen(
            [*prefix, *command, "serve", checkpoint, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.output: list[str] = []
        ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(ready,), daemon=True)
        self._reader.start()
        if not ready.wait(start_s) or not self.url:
            self.process.kill()
            raise AssertionError("the server did not become ready:\n" + "".join(self.output))
        self.grpc, self.http = self._printed("Triton gRPC"), self._printed("Triton HTTP")
        self.metrics = self._printed("Triton metrics")

    def _read(self, ready: threading.Event) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.output.append(line)
                if line.startswith("READY"):
                    ready.set()
        ready.set()

    @property
    def url(self) -> str:
        """The proxy's base URL; empty before the server is ready."""
        return next((line.split()[1] for line in self.output if line.startswith("READY")), "")

    def _printed(self, name: str) -> str:
        return next(line.strip().removeprefix(name).strip() for line in self.output if line.strip().startswith(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout_s)
        self._reader.join()
        return status

    def gauge(self, name: str) -> float:
        """The value of one of the server's metrics."""
        text = httpx.get(self.metrics, trust_env=False).text
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return float(found[1])

    def chat(self, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> httpx.Response:
        """POST a chat request."""
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, headers=headers, timeout=ANSWER_S, trust_env=False)

    def images(self, body: dict[str, Any]) -> list[NDArray[np.uint8]]:
        """The images that a chat request is answered with."""
        response = self.chat(body)
        assert response.status_code == 200, response.text
        return reply_images(response.json())


def reply_images(reply: dict[str, Any]) -> list[NDArray[np.uint8]]:
    """The images in a chat completion, uint8 [height, width, 3] each."""
    parts = reply["choices"][0]["message"]["content"]
    assert all(part["type"] == "image_url" for part in parts)
    return [decode_data_url(part["image_url"]["url"]) for part in parts]


def decode_data_url(url: str) -> NDArray[np.uint8]:
    """The pixels of a ``data:image/png`` URL."""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def data_url(encoded: bytes, kind: str = "png") -> str:
    """Encoded image bytes as a ``data:`` URL."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def chat_body(request: GenerationRequest) -> dict[str, Any]:
    """``request`` as a chat body."""
    skipped = ("prompt", "image", "messages", "modality")
    fields = {name: getattr(request, name) for name in REQUEST_FIELDS if name not in skipped}
    content: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
    content += [{"type": "image_url", "image_url": {"url": data_url(encoded)}} for encoded in request.image or ()]
    return {
        "messages": [{"role": "user", "content": content}],
        "modalities": [request.modality or "image"],
        **{name: value for name, value in fields.items() if value is not None},
    }


@dataclass(frozen=True)
class Streamed:
    """What a decoupled model answered: events as JSON objects, and all tensors by name, in order."""

    events: list[dict[str, Any]]
    arrays: list[Arrays]

    def last(self, name: str) -> NDArray[np.uint8]:
        """The last tensor called ``name``."""
        return next(arrays[name] for arrays in reversed(self.arrays) if name in arrays)


def infer(address: str, model: str, arrays: Arrays, datatypes: dict[str, str]) -> Streamed:
    """One request to a model over a gRPC stream, which unary models take as well; an error is raised."""
    responses: queue.Queue[Any] = queue.Queue()
    events, received = [], []
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(model, triton_inputs(arrays, datatypes), enable_empty_final_response=True)
        while True:
            result, error = responses.get(timeout=ANSWER_S)
            if error:
                raise error
            answer = result.get_response()
            received.append({output.name: result.as_numpy(output.name) for output in answer.outputs})
            if "event" in received[-1]:
                events.append(json.loads(received[-1]["event"][0]))
            if answer.parameters["triton_final_response"].bool_param:
                return Streamed(events, received)


def triton_inputs(arrays: Arrays, datatypes: dict[str, str]) -> list[triton.InferInput]:
    """``arrays`` as the gRPC client takes them."""
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, list(array.shape), datatypes[name]))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def generate(address: str, model: str, request: GenerationRequest) -> Streamed:
    """``request`` to ``bagel`` or the ensemble."""
    arrays = to_tensors(request)
    if model != "bagel":
        arrays.pop("modality", None)
    return infer(address, model, arrays, {name: spec.datatype for name, spec in REQUEST_FIELDS.items()})
