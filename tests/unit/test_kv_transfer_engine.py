"""Mooncake's transfer engine as the connector uses it: what it lacks is named, what it is asked for fits it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bagel_triton.deploy.config import MooncakeConfig
from bagel_triton.kv.connectors import mooncake
from bagel_triton.kv.connectors.base import ConnectorUnavailable
from bagel_triton.kv.connectors.mooncake import TransferEngine
from bagel_triton.protocol.errors import LeaseError


def _import_error(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    def fail(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _import_error(monkeypatch, ModuleNotFoundError("No module named 'mooncake'"))
    with pytest.raises(ConnectorUnavailable, match=r"needs the Python package mooncake-.*bagel-triton\[mooncake\]"):
        TransferEngine(MooncakeConfig())


@pytest.mark.parametrize(
    ("library", "package"),
    [("libibverbs.so.1", "libibverbs1"), ("libnuma.so.1", "libnuma1"), ("libx.so.3", "that brings libx.so.3")],
)
def test_a_missing_system_library_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, library: str, package: str
) -> None:
    _import_error(monkeypatch, ImportError(f"{library}: cannot open shared object file: No such file or directory"))
    with pytest.raises(ConnectorUnavailable) as missing:
        TransferEngine(MooncakeConfig())
    assert f"needs the system library {library}: install the package {package} (" in str(missing.value)


def test_another_error_of_the_library_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _import_error(monkeypatch, ImportError("undefined symbol: x"))
    with pytest.raises(ImportError, match="undefined symbol"):
        TransferEngine(MooncakeConfig())


class _Library:
    """Stands for the library: records how an engine was started and what it was asked for."""

    def __init__(self, results: Sequence[int] = ()) -> None:
        self.started: tuple[str, ...] = ()
        self.batches: list[int] = []
        self.results = list(results)

    def TransferEngine(self) -> _Library:
        return self

    def initialize(self, *arguments: str) -> int:
        self.started = arguments
        return 0

    def get_rpc_port(self) -> int:
        return 15000

    def batch_transfer_sync_read(self, peer: str, local: list[int], remote: list[int], sizes: list[int]) -> int:
        self.batches.append(len(local))
        return self.results.pop(0) if self.results else 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> _Library:
    made = _Library()
    for variable in ("MC_FORCE_TCP", "MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC"):
        monkeypatch.setenv(variable, "")  # so that it is as before after the test
    monkeypatch.setattr(importlib, "import_module", lambda name: made)
    return made


def test_many_pieces_go_in_batches_that_the_library_takes(library: _Library) -> None:
    engine = TransferEngine(MooncakeConfig(host="10.0.0.7"))
    assert (engine.peer, library.started) == ("10.0.0.7:15000", ("10.0.0.7", "P2PHANDSHAKE", "tcp", ""))
    engine.read("10.0.0.8:1", [(0, 0, 1)] * 300)
    assert library.batches == [128, 128, 44]


def test_a_peer_that_took_long_to_fail_is_not_asked_again_at_once(
    library: _Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(mooncake.time, "monotonic", lambda: clock.now)

    def slow(*arguments: Any) -> int:
        clock.now += 1.0
        return -1

    engine = TransferEngine(MooncakeConfig(timeout_s=5))
    good = library.batch_transfer_sync_read
    monkeypatch.setattr(library, "batch_transfer_sync_read", slow)
    with pytest.raises(LeaseError, match="cannot be read: its stage has ended"):
        engine.read("dead:1", [(0, 0, 1)])
    monkeypatch.setattr(library, "batch_transfer_sync_read", good)
    with pytest.raises(LeaseError, match="did not answer a moment ago"):
        engine.read("dead:1", [(0, 0, 1)])
    engine.read("other:1", [(0, 0, 1)])
    clock.now += 5.0
    engine.read("dead:1", [(0, 0, 1)])
    assert library.batches == [1, 1]


def test_rdma_without_a_device_is_refused_where_the_library_would_take_tcp(
    library: _Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mooncake, "RDMA_DEVICES", tmp_path / "infiniband")
    with pytest.raises(ConnectorUnavailable, match="protocol='rdma' needs an RDMA device"):
        TransferEngine(MooncakeConfig(protocol="rdma"))
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    with pytest.raises(ConnectorUnavailable, match=r"device_name=\['mlx5_1'\]: the RDMA devices here are mlx5_0"):
        TransferEngine(MooncakeConfig(protocol="rdma", device_name="mlx5_0,mlx5_1"))
    engine = TransferEngine(MooncakeConfig(protocol="rdma", device_name="mlx5_0"))
    assert library.started == ("127.0.0.1", "P2PHANDSHAKE", "rdma", "mlx5_0")
    assert not engine.reads_unregistered_memory
