"""Requests of clients that left are aborted."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from bagel_triton.protocol.request import REQUEST_FIELDS, GenerationRequest
from bagel_triton.protocol.tensors import to_tensors
from tests.serving.test_together import EIGHT, image_body, until_idle
from tests.support.exact import same_image
from tests.support.killing import Load, health
from tests.support.killing import until as wait_until
from tests.support.serving import ANSWER_S, ENDLESS_TEXT, Server, generate, infer, reply_images

LONG = image_body({**EIGHT[0], "num_inference_steps": 1000}, seed=1)


def until(server: Server, gauge: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while server.gauge(gauge) != value:
        assert time.monotonic() < deadline, f"{gauge} is not {value}"
        time.sleep(0.05)


@contextlib.contextmanager
def connection(server: Server, body: dict[str, object]) -> Iterator[None]:
    """A request in flight, whose connection is cut when the block ends."""
    data = json.dumps(body).encode()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        yield


@contextlib.contextmanager
def cut_short(server: Server, stage: str) -> Iterator[None]:
    """One request is dropped at ``stage``: its client leaves in the block, and no image comes of it."""
    counters = ("bagel_images_total", f"bagel_{stage}_cancelled_total")
    images, cancelled = (server.gauge(counter) for counter in counters)
    yield
    until(server, f"bagel_{stage}_active", 0)
    assert [server.gauge(counter) for counter in counters] == [images, cancelled + 1]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(("body", "stage"), [(LONG, "dit"), (ENDLESS_TEXT, "thinker")], ids=["dit", "thinker"])
def test_a_client_that_leaves_stops_the_work(server: Server, body: dict[str, object], stage: str, stream: bool) -> None:
    with cut_short(server, stage), connection(server, {**body, "stream": stream}):
        until(server, f"bagel_{stage}_active", 1)
    until_idle(server)
    assert len(server.images(image_body(EIGHT[1], seed=1))) == 1


def test_fifty_streams_left_at_random_leave_nothing_active(server: Server) -> None:
    chance = random.Random(3)
    streams = [({**body, "n": 1, "stream": True}, chance.uniform(0, 3)) for body in (LONG, ENDLESS_TEXT) * 25]

    def leave(stream: tuple[dict[str, object], float]) -> None:
        body, wait = stream
        with connection(server, body):
            time.sleep(wait)

    with ThreadPoolExecutor(len(streams)) as pool:
        list(pool.map(leave, streams))
    for gauge in ("thinker_active", "thinker_waiting", "dit_active", "dit_waiting", "thinker_kv_blocks_used"):
        until(server, f"bagel_{gauge}", 0)
    assert len(server.images(image_body(EIGHT[1], seed=1))) == 1
    until_idle(server)


def test_a_stages_own_client_that_leaves_stops_the_work(server: Server) -> None:
    request = GenerationRequest(prompt="A cat", height=256, num_inference_steps=1000)
    answer = generate(server.grpc, "cfg_expand", request)
    answer = infer(server.grpc, "thinker", {"plan": answer.last("plan")}, {"plan": "BYTES"})
    job = triton.InferInput("denoise_job", [1], "BYTES")
    job.set_data_from_numpy(answer.last("denoise_job"))
    with cut_short(server, "dit"), triton.InferenceServerClient(server.grpc) as client:
        call = client.async_infer("dit", [job], lambda result, error: None)
        until(server, "bagel_dit_active", 1)
        call.cancel()
    until_idle(server)


def triton_inputs(request: GenerationRequest) -> list[triton.InferInput]:
    inputs = []
    for name, array in to_tensors(request).items():
        inputs.append(triton.InferInput(name, list(array.shape), REQUEST_FIELDS[name].datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def test_a_client_of_the_ensemble_that_leaves_is_noticed_when_the_next_stage_starts(server: Server) -> None:
    images = server.gauge("bagel_images_total")
    request = GenerationRequest(prompt="A cat", height=256, num_inference_steps=1000)
    with triton.InferenceServerClient(server.grpc) as client:
        with (
            connection(server, ENDLESS_TEXT),
            connection(server, ENDLESS_TEXT),
        ):  # one has nearly the whole KV cache pool
            until(server, "bagel_thinker_waiting", 1)
            call = client.async_infer("bagel_text2img", triton_inputs(request), lambda result, error: None)
            until(server, "bagel_thinker_waiting", 2)
            call.cancel()
            time.sleep(0.5)  # until Triton knows
        until_idle(server)
    assert server.gauge("bagel_images_total") == images


def test_a_request_ends_at_its_timeout_and_its_work_with_it(server: Server) -> None:
    reply = server.chat({**LONG, "timeout": 0.5})
    assert reply.status_code == 504
    assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == ("timeout", "deadline_exceeded")
    until(server, "bagel_dit_active", 0)
    until_idle(server)


def test_of_a_burst_each_is_answered_or_clearly_refused(server: Server) -> None:
    body = image_body({"prompt": "x", "height": 16, "width": 16, "num_inference_steps": 2}, seed=1)
    wanted = server.images(body)[0]
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=ANSWER_S, trust_env=False, limits=limits) as client, ThreadPoolExecutor(300) as pool:
        url = f"{server.url}/v1/chat/completions"
        replies = list(pool.map(lambda _: client.post(url, json=body), range(300)))
    answered = [reply for reply in replies if reply.status_code == 200]
    refused = [reply for reply in replies if reply.status_code == 429]
    assert len(answered) + len(refused) == 300
    assert len(answered) >= 200
    assert all(same_image(reply_images(reply.json())[0], wanted) for reply in answered)
    assert all(int(reply.headers["retry-after"]) > 0 for reply in refused)
    until_idle(server)


@pytest.mark.long
def test_each_request_of_a_grpc_burst_is_answered_or_refused_as_overloaded(server: Server) -> None:
    inputs = triton_inputs(GenerationRequest(prompt="x", height=32, width=32, num_inference_steps=8, seed=1))
    ends: queue.Queue[str] = queue.Queue()

    def ended(result: triton.InferResult | None, error: Exception | None) -> None:
        if result is None:
            ends.put(str(error))
        elif result.get_response().parameters["triton_final_response"].bool_param:
            ends.put("answered")

    with triton.InferenceServerClient(server.grpc) as client:
        client.start_stream(ended)
        for _ in range(450):
            client.async_stream_infer("bagel", inputs, enable_empty_final_response=True)
        outcomes = [ends.get(timeout=ANSWER_S) for _ in range(450)]
    refused = [outcome for outcome in outcomes if outcome != "answered"]
    assert 0 < len(refused) <= 450 - 200
    assert all("RESOURCE_EXHAUSTED: Overloaded(): " in outcome for outcome in refused), {o[:300] for o in refused}
    until_idle(server)


def message_of(request: GenerationRequest) -> service_pb2.ModelInferRequest:
    """A whole stream of ``bagel``'s: the client that Triton's package has leaves its side of a stream open."""
    message = service_pb2.ModelInferRequest(model_name="bagel")
    for name, array in to_tensors(request).items():
        message.inputs.add(name=name, datatype=REQUEST_FIELDS[name].datatype, shape=array.shape)
        content = serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes()
        message.raw_input_contents.append(content)
    return message


@pytest.mark.long
def test_clients_that_leave_do_not_lock_triton_up_and_one_that_does_has_it_started_again(checkpoint_dir: Path) -> None:
    image = image_body(EIGHT[1], seed=1)
    fields = {"prompt": "A cat", "height": 1024, "width": 1024, "n": 2, "num_inference_steps": 1000}
    # Triton's own switch for tests makes each response hold the stream's lock for so long. A step takes little
    # longer, so a client most often leaves during a response.
    slow = {"TRITONSERVER_DELAY_GRPC_RESPONSE": "500"}
    with Server(checkpoint_dir, environment=slow) as server:
        wanted = server.images(image)[0]
        for step in range(6):
            with connection(server, {**image_body(fields, seed=1), "stream": True}):
                time.sleep(2 + 0.3 * step)
        assert same_image(server.images(image)[0], wanted)
        until_idle(server)
        for step in range(10):
            with grpc.insecure_channel(server.grpc) as channel:
                call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(
                    iter([message_of(GenerationRequest(**fields))])  # type: ignore[arg-type]
                )
                time.sleep(2 + 0.3 * step)
                call.cancel()
            try:
                httpx.post(f"{server.url}/v1/chat/completions", json=image, timeout=10, trust_env=False)
            except httpx.ReadTimeout:
                break
        else:
            pytest.fail("no client locked Triton up")
        [ended] = Load(server, [image], ANSWER_S)
        assert ended.status == 503, ended.reply
        wait_until(lambda: health(server) == 200, "the server is not back", ANSWER_S)
        assert same_image(server.images(image)[0], wanted)
        assert any("a response was not sent within 60 s: Triton hangs; starting it again" in x for x in server.output)
