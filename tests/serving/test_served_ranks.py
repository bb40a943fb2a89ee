"""A whole server whose DiT has two ranks, from vLLM-Omni's own YAML: the same images, and no rank outlives a kill."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.serving.test_together import EIGHT, image_body
from tests.support.exact import same_image
from tests.support.killing import Load, arguments, descendants, health, kill, shared_files, stage_pids, until
from tests.support.serving import Server

YAML = """\
stages:
  - stage_id: 0
    devices: "0"
  - stage_id: 1
    devices: "0,1"
    parallel_config:
      {size}: 2
"""
KILLS = int(os.environ.get("BAGEL_TRITON_KILLS", "2"))
REFERENCE = image_body(EIGHT[1], seed=1)
AT_WORK = [image_body({**EIGHT[0], "num_inference_steps": 1000}, seed) for seed in (1, 2)]
NOTICE_S, FAIL_S, RELOAD_S, CLIENT_S = 15.0, 30.0, 120.0, 120.0


def rank_pids(server: Server) -> list[int]:
    """The living ranks but the first."""
    return [pid for pid in descendants(server.process.pid) if "bagel_triton.parallel.worker" in arguments(pid)]


def served(checkpoint: Path, folder: Path, size: str) -> Iterator[Server]:
    path = folder / "deploy.yaml"
    path.write_text(YAML.format(size=size))
    with Server(checkpoint, "--deploy-config", str(path), "--worker-backend", "process") as running:
        yield running
        family = descendants(running.process.pid)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not shared_files(running)


@pytest.fixture(scope="module", params=["tensor_parallel_size", "cfg_parallel_size"])
def ranks(
    request: pytest.FixtureRequest, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Told to stop, it leaves neither a process nor a file."""
    yield from served(checkpoint_dir, tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.long
def test_images_are_those_of_one_rank(server: Server, ranks: Server) -> None:
    assert len(rank_pids(ranks)) == 1
    bodies = [image_body(fields, seed) for seed, fields in enumerate(EIGHT)]
    for ended in Load(ranks, bodies, CLIENT_S):
        assert ended.status == 200, ended.reply
    for body in bodies:
        for one, other in zip(ranks.images(body), server.images(body), strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.long
@pytest.mark.timeout(300 * (KILLS + 1))
def test_a_killed_rank_is_the_stage_dying(ranks: Server) -> None:
    """Ranks are killed in turn, the first with the stage's own process, at random times of a load."""
    image = ranks.images(REFERENCE)[0]
    before = shared_files(ranks)
    chance = random.Random(0)
    for number in range(KILLS):
        load = Load(ranks, AT_WORK, CLIENT_S)
        until(lambda: bool(ranks.gauge("bagel_dit_active")), "the DiT is not at work", CLIENT_S)
        time.sleep(chance.uniform(0.0, 0.5))
        pids = [*rank_pids(ranks), *stage_pids(ranks, "dit")]
        killed_at = time.monotonic()
        if number % 2:
            kill(ranks, "dit")
        else:
            os.kill(pids[0], signal.SIGKILL)
        for ended in load:
            assert ended.status == 503, ended.reply
            assert ended.at - killed_at < FAIL_S
        until(lambda pids=pids: not any(arguments(pid) for pid in pids), "a process is left", NOTICE_S)
        until(lambda: health(ranks) == 200 and len(rank_pids(ranks)) == 1, "the stage is not back", RELOAD_S)
        assert same_image(ranks.images(REFERENCE)[0], image)
        assert shared_files(ranks) == before
