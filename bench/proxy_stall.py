"""``proxy_stall``: how long the HTTP API keeps an event back while it takes a large body, and what idle streams cost.

The API runs as ``bagel-triton proxy`` before a Triton that only writes events: each holds the time
at which it was sent, so a client that receives it knows how long it was on its way. No engine
runs, so the figures are those of the API alone. ``python -m bench.proxy_stall`` is that Triton.
"""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bagel_triton.protocol.events import AnswerEvent, DoneEvent, Event, TextEvent, encode_event
from bagel_triton.protocol.messages import Usage
from bench.figure import Figure, median
from bench.setting import Setting

NAME = "proxy_stall"
GOAL_MS = 50.0
BODY_MIB, IDLE_STREAMS, IDLE_S, EVENT_S = 60, 200, 5.0, 0.01
CHAT = "/v1/chat/completions"
MIB = 2**20


def run(setting: Setting) -> list[Figure]:
    """The longest an event is late while a large body comes in; processor time and memory of idle streams."""
    with _proxy() as (url, process):
        share, kib = _idle(url, process)  # first: what a large body leaves in the heap would serve them
        quiet = [_latest_ms(url, None) for _ in range(setting.trials)]
        busy = [_latest_ms(url, _large_body()) for _ in range(setting.trials)]
    return [
        median(NAME, "latest event, nothing else going on", quiet, "ms"),
        median(NAME, f"latest event beside a {BODY_MIB} MiB body", busy, "ms", GOAL_MS, "lower"),
        Figure(NAME, f"{IDLE_STREAMS} idle streams, of one core", share * 100, "%"),
        Figure(NAME, "memory of one of them", kib, "KiB"),
    ]


def _large_body() -> bytes:
    """A chat request with one image of nearly the largest size."""
    data = base64.b64encode(os.urandom((BODY_MIB * MIB - 1024) // 4 * 3))
    head = b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,'
    return head + data + b'"}},{"type":"text","text":"large"}]}]}'


def _latest_ms(url: str, body: bytes | None) -> float:
    """The most milliseconds an event of a stream was on its way, while ``body`` was sent and answered."""
    ended = threading.Event()

    def send() -> None:
        if body is None:
            time.sleep(1.0)
        else:
            # Another process: this one must not be late for the events itself.
            command = ["curl", "-sS", "--fail-with-body", "-o", os.devnull, "--data-binary", "@-", url + CHAT]
            subprocess.run(command, input=body, check=True)
        ended.set()

    latest = 0.0
    with httpx.stream("POST", url + CHAT, json=_chat("timed"), timeout=60, trust_env=False) as reply:
        reply.raise_for_status()
        lines = reply.iter_lines()
        for _ in range(20):  # the first ones are late because the process is new
            next(lines)
        sender = threading.Thread(target=send)
        sender.start()
        for line in lines:
            if '"content":"' in line:
                sent = float(line.partition('"content":"')[2].partition('"')[0])
                latest = max(latest, time.monotonic() - sent)
            if ended.is_set():
                break
    sender.join()
    return latest * 1e3


def _idle(url: str, process: subprocess.Popen[str]) -> tuple[float, float]:
    """The share of one core, and KiB of memory a stream, with streams open on which nothing comes."""
    before = _resident_kib(process.pid)
    with contextlib.ExitStack() as held:
        client = held.enter_context(
            httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None))
        )
        for _ in range(IDLE_STREAMS):
            reply = held.enter_context(client.stream("POST", url + CHAT, json=_chat("idle")))
            next(reply.iter_lines())
        kib = (_resident_kib(process.pid) - before) / IDLE_STREAMS
        started, used = time.monotonic(), _cpu_s(process.pid)
        time.sleep(IDLE_S)
        return (_cpu_s(process.pid) - used) / (time.monotonic() - started), kib


def _chat(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], "stream": True}


def _resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1])


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _proxy() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The URL and the process of an API before a Triton that writes events."""
    with _process("-m", "bench.proxy_stall") as triton:
        address = _line(triton)
        command = ("-m", "bagel_triton.serving.cli", "proxy", "--port", "0", "--triton-grpc", address)
        with _process(*command, "--no-access-log") as proxy:
            yield _line(proxy).split()[2], proxy


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None, "it is a pipe"
    return process.stdout.readline().strip()


class _EventWriter(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers a request for a text by its own words: ``timed``, ``idle``, or anything else at once."""

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        """The events of each request."""
        for request in requests:
            words = b"".join(content for content in request.raw_input_contents if len(content) < 1024)
            yield _response(TextEvent(0, "content", f"{time.monotonic():.6f}"))
            while b"idle" in words and context.is_active():
                time.sleep(0.1)
            while b"timed" in words and context.is_active():
                time.sleep(EVENT_S)
                yield _response(TextEvent(0, "content", f"{time.monotonic():.6f}"))
            yield _response(AnswerEvent(0, "", "", "stop"))
            yield _response(DoneEvent("r", None, Usage(), ()))


def _response(event: Event) -> Any:
    text = encode_event(event)
    response = service_pb2.ModelInferResponse(model_name="bagel")
    response.outputs.add(name="event", datatype="BYTES", shape=[1])
    response.raw_output_contents.append(len(text).to_bytes(4, "little") + text)
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def main() -> None:
    """Serve until terminated; the address is printed."""
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(IDLE_STREAMS + 8), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_EventWriter(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
