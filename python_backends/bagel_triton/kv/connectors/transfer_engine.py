"""Mooncake's transfer engine: this process's memory read and written by its peers, by TCP or RDMA.

Peers find each other by a handshake of their own; no master and no metadata server run.
The library listens on two ports of **every** interface, whatever ``host`` says, and asks
nobody for a password: it hands out registered memory, and no other, to whoever connects.
``host`` is only the address that peers are told. So those ports belong on a network of
trusted hosts; ``MC_MIN_PRC_PORT`` and ``MC_MAX_PRC_PORT`` in the environment bound them.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bagel_triton.deploy.config import MooncakeConfig
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.protocol.errors import LeaseError

PACKAGE = "mooncake-transfer-engine-non-cuda"
RDMA_DEVICES = Path("/sys/class/infiniband")
# Debian's names of the packages with the libraries that the wheel expects of the system.
SYSTEM_PACKAGES = {"libibverbs.so.1": "libibverbs1", "libnuma.so.1": "libnuma1", "libcurl.so.4": "libcurl4"}
SLOW_S = 0.2
PIECES = 128  # of one batch: with a few thousand the library's queue overflows and all of them fail
Piece = tuple[int, int, int]  # local address, peer's address, bytes


class TransferEngine:
    """One engine; ``peer`` is the name by which others reach it.

    Raises:
        ConnectorUnavailable: the library or the RDMA device is missing, or it would not start.
    """

    def __init__(self, config: MooncakeConfig) -> None:
        library = load("mooncake.engine")
        prepare(config)
        self._config = config
        self._engine = library.TransferEngine()
        if self._engine.initialize(config.host, "P2PHANDSHAKE", config.protocol, config.device_name):
            raise ConnectorUnavailable(f"Mooncake's transfer engine did not start with {config}")
        self.peer = f"{config.host}:{self._engine.get_rpc_port()}"
        self._failed_at: dict[str, float] = {}

    @property
    def reads_unregistered_memory(self) -> bool:
        """Whether the local side of a transfer may be memory that was never registered."""
        return self._config.protocol == "tcp"

    def register(self, address: int, size: int) -> None:
        """Let peers read and write ``size`` bytes at ``address``, and the network card too."""
        if self._engine.register_memory(address, size):
            raise ConnectorUnavailable(f"Mooncake's transfer engine could not register {size} bytes of memory")

    def unregister(self, address: int) -> None:
        """Take memory back before it is freed."""
        if self._engine.unregister_memory(address):
            raise RuntimeError(f"memory at {address:#x} was not registered")

    def read(self, peer: str, pieces: Sequence[Piece]) -> None:
        """Copy from ``peer``; raises :class:`LeaseError` where it does not answer or has no such memory."""
        self._transfer(self._engine.batch_transfer_sync_read, peer, pieces)

    def write(self, peer: str, pieces: Sequence[Piece]) -> None:
        """Copy to ``peer``; errors as for :meth:`read`."""
        self._transfer(self._engine.batch_transfer_sync_write, peer, pieces)

    def _transfer(self, transfer: Any, peer: str, pieces: Sequence[Piece]) -> None:
        failed_at = self._failed_at.get(peer)
        if failed_at is not None and time.monotonic() - failed_at < self._config.timeout_s:
            # Each attempt at a dead peer takes seconds, and many leases may point there.
            raise LeaseError(f"the arena at {peer} did not answer a moment ago")
        started = time.monotonic()
        for start in range(0, len(pieces), PIECES):
            local, remote, sizes = (list(column) for column in zip(*pieces[start : start + PIECES], strict=True))
            if transfer(peer, local, remote, sizes):
                if time.monotonic() - started > SLOW_S:
                    self._failed_at[peer] = time.monotonic()
                raise LeaseError(f"the arena at {peer} cannot be read: its stage has ended or is out of reach")
        self._failed_at.pop(peer, None)


def load(module: str) -> Any:
    """A module of the library; raises :class:`ConnectorUnavailable` naming what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConnectorUnavailable(
            f"connector=mooncake needs the Python package {PACKAGE}: install the extra bagel-triton[mooncake]"
        ) from error
    except ImportError as error:
        found = re.match(r"(lib\S+\.so\S*): cannot open shared object file", str(error))
        if found is None:
            raise
        library = found[1]
        raise ConnectorUnavailable(
            f"connector=mooncake needs the system library {library}: install the package "
            f"{SYSTEM_PACKAGES.get(library, f'that brings {library}')} (its name on Debian and Ubuntu)"
        ) from error


def prepare(config: MooncakeConfig) -> None:
    """Set what the library takes from the environment alone, when an engine starts.

    Raises:
        ConnectorUnavailable: the RDMA device is missing.
    """
    _check_device(config)
    if config.protocol == "tcp":  # without this it chooses RDMA by itself
        os.environ["MC_FORCE_TCP"] = "1"
    # These end a transfer to a peer that fell silent.
    for variable in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        os.environ[variable] = str(config.timeout_s)


def _check_device(config: MooncakeConfig) -> None:
    """The library takes TCP, without a word, where the RDMA device is not there."""
    if config.protocol != "rdma":
        return
    devices = sorted(path.name for path in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []
    if not devices:
        raise ConnectorUnavailable(f"mooncake.protocol='rdma' needs an RDMA device; {RDMA_DEVICES} has none")
    if missing := [name for name in config.device_name.split(",") if name and name not in devices]:
        raise ConnectorUnavailable(f"mooncake.device_name={missing}: the RDMA devices here are {', '.join(devices)}")
