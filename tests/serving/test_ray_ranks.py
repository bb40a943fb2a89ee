"""A server whose ranks are actors of a Ray cluster of two nodes: the replies of one rank, and the ends of both."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bagel_triton.deploy.config import DeployConfig, DitConfig, ThinkerConfig, VaeDecodeConfig
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
# By name: what has ranks, and how many of its actors are on each of two nodes with room for one and for two.
STAGES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "thinker": ({"thinker": ThinkerConfig(tensor_parallel_size=2)}, [0, 1]),
    "cfg_ulysses": ({"dit": DitConfig(cfg_parallel_size=2, ulysses_degree=2)}, [1, 2]),
    "cfg_tensor": ({"dit": DitConfig(cfg_parallel_size=2, tensor_parallel_size=2)}, [1, 2]),
    "hsdp": ({"dit": DitConfig(use_hsdp=True, hsdp_shard_size=2, hsdp_replicate_size=2)}, [1, 2]),
    "vae": ({"vae_decode": VaeDecodeConfig(patch_parallel_size=4)}, [1, 2]),
}
FILE = """\
worker_backend: ray
stages:
  - stage_id: 0
  - stage_id: 1
    parallel_config:
      ulysses_degree: 2
      use_hsdp: true
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


@pytest.fixture(scope="module")
def drawn_by_one(checkpoint_dir: Path) -> Tensor:
    return drawn(DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32"))


@pytest.fixture
def both_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster, and this process as a driver that leaves it."""
    for name, value in ON_LOOPBACK.items():
        monkeypatch.setenv(name, value)
    with cluster(1, 2) as running:
        yield running
        sys.modules["ray"].shutdown()
        until(lambda: not any(running.actors), "an actor is left", NOTICE_S)


@pytest.mark.parametrize("name", STAGES)
def test_one_stage_on_two_nodes_draws_what_one_rank_does(
    checkpoint_dir: Path, name: str, both_nodes: Cluster, drawn_by_one: Tensor
) -> None:
    fields, expected = STAGES[name]
    on_ray = {"worker_backend": "ray", "ray_address": both_nodes.address}
    found: list[list[int]] = []
    config = DeployConfig(str(checkpoint_dir), device="cpu", dtype="float32", **fields, **on_ray)
    image = drawn(config, lambda: found.extend(both_nodes.actors))
    assert [*map(len, found)] == expected
    assert int((image - drawn_by_one).abs().max()) <= 1


def drawn(config: DeployConfig, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
    stages = LocalStages(config)
    try:
        meanwhile()
        return generate(stages, MIXED[2]).pixels[0].int()
    finally:
        stages.close()


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
