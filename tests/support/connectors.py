"""Connectors between processes, made by name."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, MooncakeConfig, ThinkerConfig
from bagel_triton.kv.connectors.base import ConnectorUnavailable, Consumer, Producer
from bagel_triton.kv.connectors.registry import open_consumer, open_producer
from bagel_triton.messages import KVGeometry
from tests.support.kv import GEOMETRY


def require_mooncake() -> None:
    """Skip where Mooncake's library, or a system library that it needs, is not installed."""
    from bagel_triton.kv.connectors import transfer_engine

    if importlib.util.find_spec("mooncake") is None:
        pytest.skip("the extra bagel-triton[mooncake] is not installed")
    try:
        transfer_engine.load()
    except ConnectorUnavailable as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Ends:
    """What makes either end of connector ``name``, here or, by pickle, elsewhere."""

    name: str
    prefix: str
    blocks: int = 16
    geometry: KVGeometry = GEOMETRY
    device: str = "cpu"
    timeout_s: int = 2

    @property
    def config(self) -> DeployConfig:
        tokens = self.blocks * self.geometry.block_tokens
        return DeployConfig(
            checkpoint="",
            shm_prefix=self.prefix,
            connector=self.name,  # type: ignore[arg-type]
            mooncake=MooncakeConfig(timeout_s=self.timeout_s),
            thinker=ThinkerConfig(kv_tokens=tokens, block_tokens=self.geometry.block_tokens),
        )

    def producer(self) -> Producer:
        return open_producer(self.config, self.geometry, torch.device(self.device))

    def consumer(self) -> Consumer:
        return open_consumer(self.config, torch.device(self.device))

    def files(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"{self.prefix}_*"))
