"""A whole server whose stages have two ranks, from vLLM-Omni's own YAML: the same replies, and none outlives a kill."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.serving.test_together import EIGHT, essence, image_body
from tests.support.exact import same_image
from tests.support.killing import Load, arguments, descendants, health, kill, shared_files, stage_pids, until
from tests.support.serving import Server

# By name: a file, and its stages with a rank beside the first.
FILES = {
    "tensor": (
        """\
stages:
  - stage_id: 0
    devices: "0,1"
    tensor_parallel_size: 2
  - stage_id: 1
    devices: "0,1"
    parallel_config:
      tensor_parallel_size: 2
""",
        ("thinker", "dit"),
    ),
    "cfg": (
        """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1"
    parallel_config:
      cfg_parallel_size: 2
""",
        ("dit",),
    ),
    "vae": (
        """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1"
    vae_use_tiling: true
    parallel_config:
      vae_patch_parallel_size: 2
""",
        ("vae_decode",),
    ),
}
KILLS = int(os.environ.get("BAGEL_TRITON_KILLS", "2"))
REFERENCE = image_body(EIGHT[1], seed=1)
TEXT = {"messages": [{"role": "user", "content": "Describe a cat"}], "modalities": ["text"], "max_tokens": 24}
SAMPLED = {**TEXT, "temperature": 0.9, "seed": 7, "n": 2}
AT_WORK = {
    "dit": [image_body({**EIGHT[0], "num_inference_steps": 1000}, seed) for seed in (1, 2)],
    "thinker": [{**TEXT, "max_tokens": 8000, "ignore_eos": True, "n": n} for n in (1, 2)],
}
NOTICE_S, FAIL_S, RELOAD_S, CLIENT_S = 15.0, 30.0, 120.0, 120.0


def rank_pids(server: Server, stage: str | None = None) -> list[int]:
    """The living ranks but the first, of one stage or of all."""
    of = stage_pids(server, stage) if stage is not None else [server.process.pid]
    found = {pid for parent in of for pid in descendants(parent)}
    return sorted(pid for pid in found if "bagel_triton.parallel.worker" in arguments(pid))


def served(checkpoint: Path, folder: Path, name: str) -> Iterator[Server]:
    path = folder / "deploy.yaml"
    path.write_text(FILES[name][0])
    with Server(checkpoint, "--deploy-config", str(path), "--worker-backend", "process") as running:
        yield running
        family = descendants(running.process.pid)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not shared_files(running)


@dataclass(frozen=True)
class Ranked:
    """A server, and those of its stages that have a rank beside the first."""

    server: Server
    stages: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every rank is there."""
        return all(len(rank_pids(self.server, stage)) == 1 for stage in self.stages)


@pytest.fixture(scope="module", params=FILES)
def ranked(
    request: pytest.FixtureRequest, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ranked]:
    """Told to stop, it leaves neither a process nor a file."""
    for running in served(checkpoint_dir, tmp_path_factory.mktemp("ranks"), request.param):
        yield Ranked(running, FILES[request.param][1])


@pytest.mark.long
def test_replies_are_those_of_one_rank(server: Server, ranked: Ranked) -> None:
    assert ranked.whole
    ranks = ranked.server
    bodies = [image_body(fields, seed) for seed, fields in enumerate(EIGHT)]
    for ended in Load(ranks, [*bodies, TEXT, SAMPLED], CLIENT_S):
        assert ended.status == 200, ended.reply
    for body in bodies:
        for one, other in zip(ranks.images(body), server.images(body), strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    for body in (TEXT, SAMPLED):
        one, other = (of.chat(body).json() for of in (ranks, server))
        assert essence(one)[:2] == essence(other)[:2]


@pytest.mark.long
@pytest.mark.timeout(300 * (KILLS + 1))
def test_a_killed_rank_is_the_stage_dying(ranked: Ranked) -> None:
    """Ranks are killed in turn, every other time with the stage's own process, at random times of a load."""
    ranks = ranked.server
    image = ranks.images(REFERENCE)[0]
    before = shared_files(ranks)
    chance = random.Random(0)
    for number in range(KILLS * len(ranked.stages)):
        stage = ranked.stages[number % len(ranked.stages)]
        load = Load(ranks, AT_WORK.get(stage, []), CLIENT_S)  # an image is decoded in no time
        if stage in AT_WORK:
            until(lambda stage=stage: bool(ranks.gauge(f"bagel_{stage}_active")), "the stage is not at work", CLIENT_S)
            time.sleep(chance.uniform(0.0, 0.5))
        pids = [*rank_pids(ranks, stage), *stage_pids(ranks, stage)]
        killed_at = time.monotonic()
        if number // len(ranked.stages) % 2:
            kill(ranks, stage)
        else:
            os.kill(pids[0], signal.SIGKILL)
        for ended in load:
            assert ended.status == 503, ended.reply
            assert ended.at - killed_at < FAIL_S
        until(lambda pids=pids: not any(arguments(pid) for pid in pids), "a process is left", NOTICE_S)
        until(lambda: health(ranks) == 200 and ranked.whole, "the stage is not back", RELOAD_S)
        assert same_image(ranks.images(REFERENCE)[0], image)
        assert shared_files(ranks) == before
