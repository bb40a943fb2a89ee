"""Connectors between processes, made by name."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import DeployConfig, MooncakeConfig, MooncakeStoreConfig, ThinkerConfig
from bagel_triton.engine.build import open_consumer, open_producer
from bagel_triton.kv.connectors.base import ConnectorUnavailable, Consumer, Producer
from bagel_triton.protocol.messages import KVGeometry
from bagel_triton.serving import machine
from tests.support.kv import GEOMETRY


def require_mooncake() -> None:
    """Skip where Mooncake's library, or a system library that it needs, is not installed."""
    from bagel_triton.kv.connectors import mooncake

    if importlib.util.find_spec("mooncake") is None:
        pytest.skip("the extra bagel-triton[mooncake] is not installed")
    try:
        mooncake.load("mooncake.engine")
    except ConnectorUnavailable as error:
        pytest.skip(str(error))


@contextlib.contextmanager
def mooncake_master(log: Path) -> Iterator[str]:
    """A ``mooncake_master`` of this machine: its HOST:PORT."""
    require_mooncake()
    import mooncake

    port, metrics = machine.choose_ports({"master": 0, "metrics": 0}).values()
    folder = Path(mooncake.__path__[0])
    command = [str(folder / "mooncake_master"), "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
    command += ["--metrics_host=127.0.0.1", f"--metrics_port={metrics}"]
    libraries = {**os.environ, "LD_LIBRARY_PATH": str(folder)}  # where the set-up may have put libibverbs
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=libraries, stdout=output, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 30
        while True:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Ends:
    """What makes either end of connector ``name``, here or, by pickle, elsewhere."""

    name: str
    prefix: str
    blocks: int = 16
    geometry: KVGeometry = GEOMETRY
    device: str = "cpu"
    timeout_s: int = 2
    master: str = ""

    @property
    def config(self) -> DeployConfig:
        tokens = self.blocks * self.geometry.block_tokens
        return DeployConfig(
            checkpoint="",
            shm_prefix=self.prefix,
            connector=self.name,  # type: ignore[arg-type]
            mooncake=MooncakeConfig(timeout_s=self.timeout_s),
            mooncake_store=MooncakeStoreConfig(timeout_s=self.timeout_s, master=self.master),
            thinker=ThinkerConfig(kv_tokens=tokens, block_tokens=self.geometry.block_tokens),
        )

    def producer(self) -> Producer:
        return open_producer(self.config, self.geometry, torch.device(self.device))

    def consumer(self) -> Consumer:
        return open_consumer(self.config, torch.device(self.device))

    def files(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"{self.prefix}_*"))
