"""A server that sleeps gives its memory back, and wakes to the same images."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bagel_triton.serving.flags import TOY
from bagel_triton.serving.machine import source_file
from tests.serving.test_together import image_body
from tests.support.killing import descendants, kill, shared_files
from tests.support.serving import ANSWER_S, Server, reply_images
from tests.support.waiting import soon

ADMIN = {"Authorization": "Bearer admin"}
IMAGE = {"prompt": "A cute cat", "height": 32, "width": 32, "num_inference_steps": 3}
MIB = 2**20
GROWN_MIB, WEIGHTS_MIB = 12, 10


@pytest.fixture(scope="module", params=["bagel", "bagel_single_stage"])
def sleepy(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each topology that may be put to sleep; the toy has 12 MiB of weights."""
    arguments = ("--deploy-config", request.param, "--kv-tokens", "65536", "--admin-api-key", "admin")
    with Server(source_file(TOY), *arguments) as running:
        yield running


def post(server: Server, path: str, **given: Any) -> dict[str, Any]:
    reply = httpx.post(server.url + path, headers=ADMIN, timeout=ANSWER_S, trust_env=False, **given)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def proportional(server: Server) -> int:
    """Bytes of all processes, a page that several map counted once."""
    total = 0
    for pid in descendants(server.process.pid):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def health(server: Server) -> tuple[int, str]:
    reply = httpx.get(f"{server.url}/health/ready", trust_env=False)
    return reply.status_code, reply.json()["status"]


@pytest.mark.long
def test_many_sleeps_free_memory_and_change_nothing(sleepy: Server) -> None:
    expected = sleepy.images(image_body(IMAGE, seed=1))[0]
    files = shared_files(sleepy)
    sizes, awake = [], []
    for _ in range(8):
        post(sleepy, "/v1/sleep", json={"level": 2})
        assert health(sleepy) == (200, "asleep")
        assert sleepy.gauge("bagel_asleep") == 1
        assert not any(kind in name for name in shared_files(sleepy) for kind in ("_weights", "_kv"))
        sizes.append(proportional(sleepy))
        assert post(sleepy, "/v1/wake")["state"] == "awake"
        assert health(sleepy) == (200, "ready")
        assert np.array_equal(sleepy.images(image_body(IMAGE, seed=1))[0], expected)
        awake.append(proportional(sleepy))
    print(
        *(f"{name} {[round(size / MIB, 1) for size in found]}" for name, found in (("awake", awake), ("asleep", sizes)))
    )
    # The least of three: an allocator may hold some MiB at one moment, which it gives back.
    assert min(sizes[-3:]) - min(sizes[2:5]) < GROWN_MIB * MIB
    assert awake[-1] - sizes[-1] > WEIGHTS_MIB * MIB
    assert soon(lambda: {name for name in shared_files(sleepy) if "_asleep" not in name} >= set(files))


@pytest.mark.long
def test_requests_in_flight_end_and_later_ones_wait_for_the_wake(sleepy: Server) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(sleepy.chat, image_body({**IMAGE, "num_inference_steps": 100}, seed=2))
        assert soon(lambda: sleepy.gauge("bagel_requests_active") > 0)
        sleeping = pool.submit(post, sleepy, "/v1/sleep")
        assert running.result().status_code == 200
        assert sleeping.result()["state"] == "asleep"
        waiting = pool.submit(sleepy.chat, image_body(IMAGE, seed=3))
        assert soon(lambda: sleepy.gauge("bagel_requests_active") == 1)
        assert not waiting.done()
        post(sleepy, "/v1/wake")
        assert len(reply_images(waiting.result().json())) == 1


@pytest.mark.long
def test_a_client_that_leaves_calls_its_sleep_off_while_requests_run(sleepy: Server) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(sleepy.chat, image_body({**IMAGE, "num_inference_steps": 1000, "n": 4}, seed=2))
        assert soon(lambda: sleepy.gauge("bagel_requests_active") > 0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{sleepy.url}/v1/sleep", headers=ADMIN, timeout=0.5, trust_env=False)
        assert soon(lambda: health(sleepy) == (200, "ready"))
        assert not running.done()
        assert running.result().status_code == 200
    assert health(sleepy) == (200, "ready")


@pytest.mark.long
def test_a_stage_that_dies_in_its_sleep_comes_back_asleep(sleepy: Server) -> None:
    if not [name for name in shared_files(sleepy) if "_stage_dit" in name]:
        pytest.skip("one process has every stage")
    expected = sleepy.images(image_body(IMAGE, seed=4))[0]
    post(sleepy, "/v1/sleep", json={"level": 2})
    killed = kill(sleepy, "dit")
    assert soon(lambda: killed not in descendants(sleepy.process.pid) and health(sleepy) == (200, "asleep"), 60)
    post(sleepy, "/v1/wake")
    assert np.array_equal(sleepy.images(image_body(IMAGE, seed=4))[0], expected)
