"""A stage process that is killed takes no request with it for long and comes back; a stopped server leaves nothing."""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from bagel_triton.deploy.topology import BAGEL, ENSEMBLE
from bagel_triton.protocol.request import GenerationRequest
from tests.serving.test_leaving import triton_inputs
from tests.serving.test_together import EIGHT, image_body
from tests.support.exact import same_image
from tests.support.killing import Load, arguments, descendants, health, kill, shared_files, stage_pids, until
from tests.support.serving import ENDLESS_TEXT, STOP_S, Server

STAGES = tuple(model for model in BAGEL.models if model != ENSEMBLE)
KILLS = int(os.environ.get("BAGEL_TRITON_KILLS", "0"))
REFERENCE = image_body(EIGHT[1], seed=1)
# The killed stage's requests fail within FAIL_S; those at the others go on, and CLIENT_S is for a slow machine.
NOTICE_S, FAIL_S, RELOAD_S, CLIENT_S, IDLE_S = 15.0, 15.0, 120.0, 120.0, 30.0
MIXED: list[dict[str, Any]] = [
    image_body({**EIGHT[0], "num_inference_steps": 150}, seed=1),
    image_body({**EIGHT[2], "think": True, "max_think_tokens": 40}, seed=2),
    *(image_body(fields, seed) for seed, fields in enumerate(EIGHT[1:], start=3)),
    {
        "messages": [{"role": "user", "content": "Hello"}],
        "modalities": ["text"],
        "max_tokens": 300,
        "n": 4,
        "temperature": 1.0,
    },
]
# A load that is sure to be at the stage: many steps, many tokens, or (where calls are short) many requests.
AT: dict[str, list[dict[str, Any]]] = {
    "dit": [image_body({**EIGHT[0], "num_inference_steps": 1000}, seed) for seed in (1, 2)],
    "thinker": [ENDLESS_TEXT],
}


@pytest.fixture(scope="module")
def own_server(checkpoint_dir: Path) -> Iterator[Server]:
    """A server for this module; told to stop, it leaves neither a process nor a file."""
    with Server(checkpoint_dir) as running:
        yield running
        family = descendants(running.process.pid)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not shared_files(running)


@pytest.fixture(scope="module")
def image(own_server: Server) -> np.ndarray:
    return own_server.images(REFERENCE)[0]


def _idle(server: Server) -> bool:
    names = ("thinker_kv_leases", "thinker_kv_blocks_used", "thinker_active", "dit_active", "vae_decode_active")
    return not any(server.gauge(f"bagel_{name}") for name in names)


def _check_recovery(server: Server, killed: int, before: dict[str, Any], image: np.ndarray) -> None:
    """It is well again: healthy, the same answer as ever, idle, and nothing left over."""

    def back() -> bool:
        replaced = not arguments(killed) and _state(server)["processes"] == before["processes"]
        return replaced and health(server) == 200

    print(f"back after {until(back, 'the stage is not back', RELOAD_S):.1f} s")
    assert same_image(server.images(REFERENCE)[0], image)
    until(lambda: _idle(server), "something is left in a stage", IDLE_S)
    assert _state(server) == before


def _state(server: Server) -> dict[str, Any]:
    return {"files": shared_files(server), "processes": {stage: len(stage_pids(server, stage)) for stage in STAGES}}


@pytest.mark.parametrize("stage", ["dit", pytest.param("thinker", marks=pytest.mark.long), "bagel"])
def test_requests_at_a_killed_stage_fail_at_once(own_server: Server, image: np.ndarray, stage: str) -> None:
    before = _state(own_server)
    load: list[Load] = []
    # The images first: the texts take nearly all of the KV cache, and wait for each other.
    for name in ("dit", "thinker") if stage == "bagel" else (stage,):
        load.append(Load(own_server, AT[name] * (3 if name == "thinker" and stage == "bagel" else 1), CLIENT_S))
        until(lambda name=name: own_server.gauge(f"bagel_{name}_active"), f"{name} is not at work", CLIENT_S)  # type: ignore[misc]
    killed = kill(own_server, stage)
    at = time.monotonic()
    until(lambda: health(own_server) == 503, "a dead stage looks healthy", NOTICE_S)
    for ended in chain(*load):
        assert ended.status == 503, ended.reply
        assert ended.reply["error"]["code"] == "stage_unavailable"
        # Of what it holds at that moment, a lock may bring down tritonserver itself, which is then started again.
        said = f"{stage} (died|is unavailable)|Triton at .* cannot be reached"
        assert re.match(said, ended.reply["error"]["message"])
        assert ended.at - at < FAIL_S
    _check_recovery(own_server, killed, before, image)


@pytest.mark.long
def test_killed_stages_leave_no_threads_in_bagel(own_server: Server, image: np.ndarray) -> None:
    def threads() -> int:
        [bagel] = stage_pids(own_server, "bagel")
        return len(list(Path(f"/proc/{bagel}/task").iterdir()))

    before = threads()
    for number, stage in enumerate(("dit", "thinker", "dit")):
        load = Load(own_server, 8 * AT[stage][:1], CLIENT_S)
        until(lambda stage=stage: bool(own_server.gauge(f"bagel_{stage}_active")), f"{stage} is idle", CLIENT_S)
        kill(own_server, stage)
        assert {ended.status for ended in load} == {503}
        until(lambda: health(own_server) == 200, "the stage is not back", RELOAD_S)
        # Triton itself adds threads to a stub as it is used; a call that leaks would leave eight.
        until(lambda: threads() < before + 8, f"threads are left after {number + 1} kills", IDLE_S)
    assert same_image(own_server.images(REFERENCE)[0], image)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_while_idle_comes_back(own_server: Server, image: np.ndarray, stage: str) -> None:
    before = _state(own_server)
    killed = kill(own_server, stage)
    until(lambda: health(own_server) == 503, "a dead stage looks healthy", NOTICE_S)
    # Before it is back, a request is refused, not kept. (Of cfg_expand another process may serve it.)
    asked = time.monotonic()
    response = own_server.chat(REFERENCE)
    assert response.status_code == 503 or stage == "cfg_expand", response.text
    assert time.monotonic() - asked < FAIL_S
    _check_recovery(own_server, killed, before, image)


@pytest.mark.long
def test_a_tritonserver_that_crashes_is_started_again(own_server: Server, image: np.ndarray) -> None:
    before = _state(own_server)
    load = Load(own_server, AT["dit"] + 3 * AT["thinker"], CLIENT_S)
    until(lambda: bool(own_server.gauge("bagel_dit_active")), "dit is not at work", CLIENT_S)
    [killed] = [pid for pid in descendants(own_server.process.pid) if "--model-control-mode" in arguments(pid)]
    os.kill(killed, signal.SIGABRT)
    at = time.monotonic()
    for ended in load:
        assert ended.status == 503, ended.reply
        assert ended.at - at < FAIL_S
    assert health(own_server) == 503
    _check_recovery(own_server, killed, before, image)


@pytest.mark.skipif(not KILLS, reason="a long run: set BAGEL_TRITON_KILLS to a number of kills")
@pytest.mark.timeout(60 * (KILLS + 5))
def test_random_kills_under_a_mixed_load(own_server: Server, image: np.ndarray) -> None:
    chance = random.Random(0)
    before = _state(own_server)
    outcomes = []
    for number in range(KILLS):
        stage = chance.choice(STAGES)
        load = Load(own_server, chance.sample(MIXED, len(MIXED)), CLIENT_S)
        time.sleep(chance.uniform(0.0, 0.8))
        killed = kill(own_server, stage)
        at = time.monotonic()
        statuses = []
        for ended in load:
            assert ended.status in (200, 503), ended.reply
            statuses.append(ended.status)
            outcomes.append((ended.status, ended.at - at, ended.reply.get("error")))
        slowest = {status: max((s for x, s, _ in outcomes if x == status), default=0.0) for status in (200, 503)}
        print(f"kill {number} of {stage}: {statuses}, slowest so far {slowest}")
        _check_recovery(own_server, killed, before, image)
    refused = [(seconds, error) for status, seconds, error in outcomes if status == 503]
    assert max((seconds for seconds, _ in refused), default=0.0) < IDLE_S, refused


def test_sigterm_during_requests_ends_them_and_leaves_nothing(own_server: Server) -> None:
    """The last of this module, whose server it ends."""
    load, told = Load(own_server, AT["dit"][:1], CLIENT_S), queue.Queue[str]()
    with triton.InferenceServerClient(own_server.grpc) as client:
        client.start_stream(lambda result, error: told.put(str(error)))
        request = GenerationRequest(prompt="x", height=512, width=512, num_inference_steps=1000, seed=2)
        client.async_stream_infer("bagel", triton_inputs(request))
        until(lambda: own_server.gauge("bagel_dit_active") == 2, "the DiT has not both", CLIENT_S)
        family = descendants(own_server.process.pid)
        assert len(family) > 5
        assert shared_files(own_server)
        started = time.monotonic()
        assert own_server.stop() == 0
        assert time.monotonic() - started < STOP_S
        assert not shared_files(own_server)
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
        [ended] = load
        assert ended.status == 503, ended.reply
    heard = [told.get() for _ in range(told.qsize())]
    assert any("UNAVAILABLE: StageUnavailable(): the server is stopping" in one for one in heard), heard[-2:]
