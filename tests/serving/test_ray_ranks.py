"""A server whose ranks are actors of a Ray cluster of two nodes: the replies of one rank, and the ends of both."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.pipeline.local import LocalStages
from tests.parity.test_text2img import MIXED
from tests.serving.test_served_ranks import AT_WORK, CLIENT_S, FAIL_S, NOTICE_S, REFERENCE, RELOAD_S, check_replies
from tests.serving.test_served_ranks import of_one_rank as of_one_rank
from tests.support.exact import same_image
from tests.support.killing import Load, arguments, descendants, health, kill, shared_files, stage_pids, until
from tests.support.ray_cluster import ON_LOOPBACK, Cluster, cluster
from tests.support.runs import generate
from tests.support.serving import Server

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'bagel-triton[ray]'"),
]
TWO_THINKERS, FOUR_DITS = ThinkerConfig(tensor_parallel_size=2), DitConfig(cfg_parallel_size=2, ulysses_degree=2)
FILE = """\
worker_backend: ray
stages:
  - stage_id: 0
  - stage_id: 1
    parallel_config:
      ulysses_degree: 2
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(0, 1) as running:  # only the other node has room
        yield running


@pytest.fixture(scope="module")
def on_ray(checkpoint_dir: Path, nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Told to stop, it leaves neither a process, nor an actor, nor a file."""
    path = tmp_path_factory.mktemp("ray") / "deploy.yaml"
    path.write_text(FILE)
    given = ["--deploy-config", str(path), "--ray-address", nodes.address]
    with Server(checkpoint_dir, *given, environment=ON_LOOPBACK, start_s=400) as running:
        yield running
        family = descendants(running.process.pid)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not shared_files(running)
    until(lambda: not any(nodes.actors), "an actor is left", NOTICE_S)


def test_replies_are_those_of_one_rank(of_one_rank: list[dict[str, object]], on_ray: Server, nodes: Cluster) -> None:
    assert [*map(len, nodes.actors)] == [0, 1]
    check_replies(on_ray, of_one_rank)
    assert any("actors of the Ray cluster" in line for line in on_ray.output)


@pytest.mark.parametrize("stage", [{"thinker": TWO_THINKERS}, {"dit": FOUR_DITS}], ids=["thinker", "dit"])
def test_one_stage_on_two_nodes_draws_what_one_rank_does(
    checkpoint_dir: Path, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thinker's rank is on this node, whose memory it maps; the DiT's three need both nodes."""
    for name, value in ON_LOOPBACK.items():
        monkeypatch.setenv(name, value)
    pixels = []
    with cluster(2, 2) as nodes:
        for fields in ({}, {**stage, "worker_backend": "ray", "ray_address": nodes.address}):
            stages = LocalStages(DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", **fields))
            try:
                pixels.append(generate(stages, MIXED[2]).pixels[0].int())
                started = nodes.actors
            finally:
                stages.close()
        sys.modules["ray"].shutdown()
        assert [*map(len, started)] == ([1, 2] if "dit" in stage else [0, 1])
        until(lambda: not any(nodes.actors), "an actor is left", NOTICE_S)
    assert int((pixels[0] - pixels[1]).abs().max()) <= 1


@pytest.mark.parametrize("of", ["actor", "stage"])
def test_an_actor_and_its_stage_end_together(on_ray: Server, nodes: Cluster, of: str) -> None:
    image, (_, [actor]) = on_ray.images(REFERENCE)[0], nodes.actors
    load = Load(on_ray, AT_WORK["dit"], CLIENT_S)
    until(lambda: bool(on_ray.gauge("bagel_dit_active")), "the DiT is not at work", CLIENT_S)
    [stage] = stage_pids(on_ray, "dit")
    at = time.monotonic()
    if of == "stage":
        kill(on_ray, "dit")
    else:
        os.kill(actor, signal.SIGKILL)
    for ended in load:
        assert ended.status == 503, ended.reply
        assert ended.at - at < FAIL_S
    until(lambda: not arguments(stage), "the stage is left", NOTICE_S)
    until(lambda: health(on_ray) == 200, "the stage is not back", RELOAD_S)
    [new] = nodes.actors[1]
    assert new != actor
    assert same_image(on_ray.images(REFERENCE)[0], image)
