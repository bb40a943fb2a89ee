"""A server whose stages have two and four ranks, from vLLM-Omni's YAML and flags: the replies of one, and kills."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagel_triton.serving.watchdog import STABLE_S
from tests.serving.test_together import CASES, EIGHT, essence, image_body
from tests.support.exact import same_image
from tests.support.killing import Load, arguments, descendants, health, shared_files, stage_pids, until
from tests.support.serving import Server, chat_body, reply_images

# By name: a file or flags, and how many ranks each stage has.
ULYSSES = """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1"
    parallel_config:
      ulysses_degree: 2
"""
CFG_ULYSSES = """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1,2,3"
    parallel_config:
      cfg_parallel_size: 2
      ulysses_degree: 2
"""
CFG_TENSOR = """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1,2,3"
    parallel_config:
      cfg_parallel_size: 2
      tensor_parallel_size: 2
"""
HSDP = """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1"
    parallel_config:
      use_hsdp: true
      hsdp_shard_size: 2
      hsdp_replicate_size: 1
"""
VAE = """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1"
    vae_use_tiling: true
    parallel_config:
      vae_patch_parallel_size: 2
"""
MESHES: dict[str, tuple[str | list[str], dict[str, int]]] = {
    "flags": (["--tensor-parallel-size", "2"], {"thinker": 2, "dit": 2}),
    "ulysses": (ULYSSES, {"thinker": 1, "dit": 2}),
    "cfg_ulysses": (CFG_ULYSSES, {"thinker": 1, "dit": 4}),
    "cfg_tensor": (CFG_TENSOR, {"thinker": 1, "dit": 4}),
    "hsdp": (HSDP, {"thinker": 1, "dit": 2}),
    "vae": (VAE, {"vae_decode": 2}),
}
KILLS = int(os.environ.get("BAGEL_TRITON_KILLS", "2"))
REFERENCE = image_body(EIGHT[1], seed=1)
TEXT = {"messages": [{"role": "user", "content": "Describe a cat"}], "modalities": ["text"], "max_tokens": 24}
SAMPLED = {**TEXT, "temperature": 0.9, "seed": 7, "n": 2}
KINDS = (
    *("t2i_default", "t2i_no_cfg", "t2i_taylorseer", "t2i_think"),
    *("edit_wide", "edit_think", "vqa", "vqa_think", "chat"),
)
BODIES = [
    *(chat_body(case.request) for case in CASES if case.name in KINDS),
    *(TEXT, SAMPLED, {**REFERENCE, "n": 3}),
]
AT_WORK = {
    "dit": [image_body({**EIGHT[0], "num_inference_steps": 1000}, seed) for seed in (1, 2)],
    "thinker": [{**TEXT, "max_tokens": 8000, "ignore_eos": True, "n": n} for n in (1, 2)],
}
NOTICE_S, FAIL_S, RELOAD_S, CLIENT_S = 15.0, 30.0, 120.0, 120.0


def rank_pids(server: Server, stage: str) -> list[int]:
    """The living ranks of a stage but the first."""
    found = {pid for parent in stage_pids(server, stage) for pid in descendants(parent)}
    return sorted(pid for pid in found if "bagel_triton.parallel.worker" in arguments(pid))


@dataclass(frozen=True)
class Ranked:
    """A server, and how many ranks each of its stages has."""

    server: Server
    ranks: dict[str, int]

    @property
    def whole(self) -> bool:
        """Whether every rank is there."""
        return all(len(rank_pids(self.server, stage)) == ranks - 1 for stage, ranks in self.ranks.items())

    @property
    def stages(self) -> list[str]:
        """The stages with a rank beside the first."""
        return [stage for stage, ranks in self.ranks.items() if ranks > 1]


@pytest.fixture(scope="module", params=MESHES)
def ranked(
    request: pytest.FixtureRequest, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranked]:
    """Told to stop, it leaves neither a process nor a file."""
    given, ranks = MESHES[request.param]
    if isinstance(given, str):
        path = tmp_path_factory.mktemp("ranks") / "deploy.yaml"
        path.write_text(given)
        given = ["--deploy-config", str(path)]
    with Server(checkpoint_dir, *given, "--worker-backend", "process", start_s=400) as running:
        yield Ranked(running, ranks)
        family = descendants(running.process.pid)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not shared_files(running)


@pytest.fixture(scope="module")
def of_one_rank(server: Server) -> list[dict[str, Any]]:
    """What each of ``BODIES`` is answered with by a server without ranks."""
    return [server.chat(body).json() for body in BODIES]


@pytest.mark.long
def test_replies_are_those_of_one_rank(of_one_rank: list[dict[str, Any]], ranked: Ranked) -> None:
    assert ranked.whole
    check_replies(ranked.server, of_one_rank)
    assert ranked.whole


def check_replies(server: Server, of_one_rank: list[dict[str, Any]]) -> None:
    """All recorded kinds of requests at once: text to image, editing, thinking, text, and several images of one."""
    with ThreadPoolExecutor(len(BODIES)) as pool:
        responses = list(pool.map(server.chat, BODIES))
    for body, response, expected in zip(BODIES, responses, of_one_rank, strict=True):
        assert response.status_code == 200, response.text
        reply = response.json()
        assert essence(reply) == essence(expected), body
        if isinstance(expected["choices"][0]["message"]["content"], list):
            for one, other in zip(reply_images(reply), reply_images(expected), strict=True):
                assert nearly(one, other), body


def nearly(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are one image, but for what ranks round: how rows are shared depends on the other requests."""
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


@pytest.mark.long
@pytest.mark.timeout(300 * (KILLS + 1))
@pytest.mark.parametrize("ranked", ["flags", "ulysses", "vae"], indirect=True)
def test_a_killed_rank_is_the_stage_dying(ranked: Ranked) -> None:
    """Any rank is killed, the first one every fourth time, at random times of a load; its other requests may end."""
    server = ranked.server
    image = server.images(REFERENCE)[0]
    before = shared_files(server)
    chance = random.Random(0)
    for number in range(KILLS * len(ranked.stages)):
        stage = ranked.stages[number % len(ranked.stages)]
        at_work = AT_WORK.get(stage, [])  # an image is decoded in no time
        load = Load(server, [*at_work, REFERENCE], CLIENT_S)
        if at_work:
            until(lambda stage=stage: bool(server.gauge(f"bagel_{stage}_active")), "the stage is not at work", CLIENT_S)
        time.sleep(chance.uniform(0.0, 0.5))
        others, first = rank_pids(server, stage), stage_pids(server, stage)
        killed_at = time.monotonic()
        killed = first[0] if number // len(ranked.stages) % 4 == 1 else chance.choice(others)
        os.kill(killed, signal.SIGKILL)
        statuses = []
        for ended in load:
            statuses.append(ended.status)
            assert ended.status == 503 or nearly(reply_images(ended.reply)[0], image), ended.reply
            assert ended.at - killed_at < FAIL_S
        assert statuses.count(503) >= len(at_work)
        until(lambda pids=(*others, *first): not any(map(arguments, pids)), "a process is left", NOTICE_S)
        until(lambda: health(server) == 200 and ranked.whole, "the stage is not back", RELOAD_S)
        back = time.monotonic() - killed_at
        assert same_image(server.images(REFERENCE)[0], image)
        assert shared_files(server) == before
        rank = 0 if killed in first else others.index(killed) + 1
        time.sleep(STABLE_S)  # a stage that dies again sooner has few restarts
        print(f"kill {number}: rank {rank} of {stage}, {statuses}, back in {back:.1f} s")
