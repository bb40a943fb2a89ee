"""Checkpoints, recorded cases and stages that every kind of test uses."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.pipeline.local import LocalStages
from bagel_triton.weights.tiny import checkpoint as tiny_checkpoint
from bagel_triton.weights.tiny.config import TinyConfig
from tests.support.cases import Case, load_cases

DATA = Path(__file__).parent / "data"
# Unlike tiny-a in every width; no width divides well, and config.json lies about the latent size.
OTHER = TinyConfig(
    hidden_size=80,
    layers=2,
    heads=8,
    kv_heads=1,
    intermediate_size=172,
    vocab_size=600,
    vae_channels=64,
    max_latent_size=20,
    stale_max_latent_size=64,
    seed=5,
)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell lets what it runs in the background ignore SIGINT, and so would every server started here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint_dir() -> Path:
    """The checkpoint that the recorded cases were made with."""
    return DATA / "tiny-a"


@pytest.fixture(scope="session")
def cases() -> tuple[Case, ...]:
    """The recorded requests."""
    return load_cases(DATA / "cases-a")


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint shaped unlike the recorded cases' one: see ``OTHER``."""
    directory = tmp_path_factory.mktemp("checkpoints") / "other"
    tiny_checkpoint.write(directory, OTHER)
    return directory


@pytest.fixture
def local_stages(checkpoint_dir: Path) -> Iterator[LocalStages]:
    """All stages in this process; nothing may be left in the pool afterwards."""
    stages = LocalStages(DeployConfig(checkpoint=str(checkpoint_dir), device="cpu", dtype="float32"))
    yield stages
    stages.close()
    assert stages.producer.pool.blocks.used == 0
    assert len(stages.producer.leases) == 0
