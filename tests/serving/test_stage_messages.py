"""Messages that no stage of ours would send: refused by name, without effect on other requests."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from bagel_triton.ipc import liveness
from bagel_triton.protocol.request import GenerationRequest
from tests.serving.test_leaving import LONG, until
from tests.serving.test_together import EIGHT, image_body, until_idle
from tests.support.exact import same_image
from tests.support.killing import Load
from tests.support.serving import ANSWER_S, Server, generate, infer

SMALL = GenerationRequest(prompt="A cat", height=32, width=32, seed=1, num_inference_steps=3)
Change = Callable[[dict[str, Any]], None]


def unpacked(array: np.ndarray) -> dict[str, Any]:
    message: dict[str, Any] = msgspec.msgpack.decode(array.reshape(-1)[0])
    return message


def send(server: Server, model: str, name: str, message: dict[str, Any]) -> None:
    packed = np.array([msgspec.msgpack.encode(message)], dtype=np.object_)
    infer(server.grpc, model, {name: packed}, {name: "BYTES"})


def withdraw(server: Server, message: dict[str, Any]) -> None:
    """The leases of a message that was not taken would last until they expire."""
    request_id = np.array([message["request_id"].encode()], dtype=np.object_)
    infer(server.grpc, "thinker", {"abort": request_id}, {"abort": "BYTES"})


def plan_of(server: Server, request: GenerationRequest = SMALL) -> dict[str, Any]:
    return unpacked(generate(server.grpc, "cfg_expand", request).last("plan"))


def job_of(server: Server) -> dict[str, Any]:
    plan = generate(server.grpc, "cfg_expand", SMALL).last("plan")
    return unpacked(infer(server.grpc, "thinker", {"plan": plan}, {"plan": "BYTES"}).last("denoise_job"))


def image(kind: str, height: int, width: int) -> dict[str, Any]:
    return {"type": kind, "height": height, "width": width, "pixels": bytes(height * width * 3)}


def segment(**fields: Any) -> Change:
    return lambda plan: plan["branches"][0]["segments"].insert(0, fields)


def on_handle(**fields: Any) -> Change:
    return lambda job: job["handles"][0].update(fields)


def on_geometry(**fields: Any) -> Change:
    return lambda job: job["handles"][0]["geometry"].update(fields)


PLANS: dict[str, tuple[Change, str]] = {
    "a token beyond the vocabulary": (segment(type="text", token_ids=[10**6]), "token ids below"),
    "a negative token": (segment(type="text", token_ids=[-1]), "not a Plan"),
    "no token": (segment(type="text", token_ids=[]), "not a Plan"),
    "an image beyond the position table": (segment(**image("vit", 14, 9800)), "multiples of 14"),
    "an image between two patches": (segment(**image("vit", 15, 15)), "multiples of 14"),
    "pixels that are missing": (segment(type="vit", height=14, width=14, pixels=b""), "not a Plan"),
    "an image of one branch alone": (
        lambda plan: plan["branches"][1]["segments"].append(image("vae", 32, 32)),
        "those of gen",
    ),
    "negative counts": (lambda plan: plan["usage"].update(prompt_tokens=-5), "not a Plan"),
}
JOBS: dict[str, tuple[Change, str]] = {
    "20,000 images": (lambda job: job["flow"].update(num_images=20000), "not a DenoiseJob"),
    "200,000 steps": (lambda job: job["flow"].update(num_inference_steps=200000), "not a DenoiseJob"),
    "a scale that overflows": (lambda job: job["flow"].update(cfg_text_scale=1e308), "not a DenoiseJob"),
    "a side beyond the position table": (lambda job: job["flow"].update(height=16 * 10**6), "height=16000000"),
    "a context without a lease": (on_handle(lease=0), "not a DenoiseJob"),
    "a slot there is not": (on_handle(slot=10**6), "not a DenoiseJob"),
    "a name with a NUL": (on_handle(pool="a\0b"), "not a DenoiseJob"),
    "a file elsewhere": (on_handle(pool="../etc/passwd"), "is not a file name"),
    "a position beyond reason": (on_handle(next_position=2**64 - 1), "not a DenoiseJob"),
    "another dtype": (on_geometry(dtype="float16"), "is not the thinker's"),
    "other blocks": (on_geometry(block_tokens=10**7), "not the thinker's"),
}


@pytest.mark.parametrize(("model", "name", "change", "error"), [
    *[pytest.param("thinker", "plan", *case, id=name) for name, case in PLANS.items()],
    *[pytest.param("dit", "denoise_job", *case, id=name) for name, case in JOBS.items()],
])  # fmt: skip
def test_an_impossible_message_is_refused_and_the_next_request_is_right(
    server: Server, model: str, name: str, change: Change, error: str
) -> None:
    body = image_body(EIGHT[1], seed=1)
    wanted = server.images(body)[0]
    message = plan_of(server) if model == "thinker" else job_of(server)
    change(message)
    with pytest.raises(InferenceServerException, match=error):
        send(server, model, name, message)
    withdraw(server, message)
    assert same_image(server.images(body)[0], wanted)


def test_an_impossible_message_does_not_disturb_those_at_work_or_in_line(server: Server) -> None:
    load = Load(server, [{**LONG, "num_inference_steps": 300}], ANSWER_S)
    until(server, "bagel_dit_active", 1)
    for change, _ in JOBS.values():
        job = job_of(server)
        change(job)
        with pytest.raises(InferenceServerException):
            send(server, "dit", "denoise_job", job)
        withdraw(server, job)
    assert [ended.status for ended in load] == [200]


@pytest.mark.long
def test_self_tests_take_no_block_that_is_promised(server: Server) -> None:
    text = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "temperature": 2.0, "n": 4}
    load = Load(server, [text], ANSWER_S)
    until(server, "bagel_thinker_active", 1)

    refusals: list[str] = []

    def flood() -> None:
        for _ in range(100):
            try:
                infer(server.grpc, "thinker", {"selftest": np.array([b"lend"], object)}, {"selftest": "BYTES"})
            except InferenceServerException as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=flood) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ended.status for ended in load] == [200]
    assert refusals
    assert all("Overloaded" in refusal for refusal in refusals)
    until(server, "bagel_thinker_kv_leases", 0)  # never claimed: they expire


def test_nothing_grows_with_the_requests_served(server: Server) -> None:
    text = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    body = image_body({"prompt": "x", "height": 16, "width": 16, "num_inference_steps": 2}, seed=1)

    def serve(count: int) -> dict[str, int]:
        for _ in range(count):
            assert server.chat(text).status_code == 200
            assert server.chat(body).status_code == 200
        until_idle(server)
        prefix = next(Path("/dev/shm").glob(f"bagel_triton_{server.process.pid}_*.lock")).name.removesuffix(".lock")
        return {f"{one.stage} {one.pid}": len(list(Path(f"/proc/{one.pid}/task").iterdir()))
                for one in liveness.processes(prefix)}  # fmt: skip

    before, after = serve(5), serve(30)
    assert before.keys() == after.keys()
    grown = {stage: (count, after[stage]) for stage, count in before.items() if after[stage] > count + 4}
    assert not grown, "threads that were not ended"


def test_base64_is_not_a_message(server: Server) -> None:
    packed = np.array([base64.b64encode(b"plan")], dtype=np.object_)
    with pytest.raises(InferenceServerException, match="not a Plan"):
        infer(server.grpc, "thinker", {"plan": packed}, {"plan": "BYTES"})
