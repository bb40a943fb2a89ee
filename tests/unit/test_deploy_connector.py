"""Which connector is chosen, for which reason, and what a deploy file may say about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_triton.deploy.config import (
    ConfigError,
    DeployConfig,
    MooncakeConfig,
    MooncakeStoreConfig,
    ThinkerConfig,
    read,
)
from bagel_triton.deploy.connector import choose
from bagel_triton.deploy.yaml import load
from bagel_triton.engine.build import open_consumer, open_producer
from bagel_triton.kv.connectors.local import LocalConsumer, LocalProducer
from tests.support.kv import GEOMETRY

PRESETS = sorted((Path(__file__).parents[2] / "build" / "deploy").glob("*.yaml"))


def _load(tmp_path: Path, text: str) -> DeployConfig:
    path = tmp_path / "deploy.yaml"
    path.write_text(text)
    return load(path, "checkpoint")


@pytest.mark.parametrize(
    ("config", "device", "chosen"),
    [
        (DeployConfig("c"), "cpu", "shm (auto: the stages run on a CPU)"),
        (DeployConfig("c"), "cuda:1", "cuda_ipc (auto: the stages share cuda:1)"),
        (DeployConfig("c", connector="shm"), "cpu", "shm (configured: the stages share one host)"),
        (DeployConfig("c", connector="cuda_ipc"), "cuda:0", "cuda_ipc (configured: the stages share one host)"),
        (
            DeployConfig("c", connector="mooncake", mooncake=MooncakeConfig(host="10.0.0.7")),
            "cpu",
            "mooncake (configured: tcp, this host is 10.0.0.7)",
        ),
        (
            DeployConfig("c", connector="mooncake_store", mooncake_store=MooncakeStoreConfig(master="10.0.0.1:50051")),
            "cpu",
            "mooncake_store (configured: tcp, this host is 127.0.0.1, the store's master 10.0.0.1:50051)",
        ),
        (
            DeployConfig("c", pipeline="bagel_single_stage"),
            "cuda:0",
            "local (pipeline bagel_single_stage is one process)",
        ),
    ],
)
def test_the_choice_and_its_reason(config: DeployConfig, device: str, chosen: str) -> None:
    assert str(choose(config, device)) == chosen


@pytest.mark.parametrize(
    ("thinker", "dit", "chosen"),
    [
        ("cpu", "cpu", "shm (auto: the stages run on a CPU)"),
        ("cuda:0", "cuda:0", "cuda_ipc (auto: the stages share cuda:0)"),
        ("cuda:0", "cuda:1", "cuda_ipc (auto: from cuda:0 to cuda:1)"),
        ("cpu", "cuda:0", "shm (auto: from cpu to cuda:0)"),
        ("cuda:1", "cpu", "cuda_ipc (auto: from cuda:1 to cpu)"),
    ],
)
def test_the_thinkers_device_decides_as_the_pool_is_there(thinker: str, dit: str, chosen: str) -> None:
    assert str(choose(DeployConfig("c"), thinker, dit)) == chosen


@pytest.mark.parametrize(
    ("thinker", "dit", "through"),
    [
        ("cpu", "cpu", ""),
        ("cuda:0", "cuda:0", ", through the hosts' memory"),
        ("cuda:0", "cuda:1", ", through the hosts' memory"),
        ("cpu", "cuda:0", ", through the hosts' memory"),
    ],
)
def test_between_hosts_stages_may_be_on_any_device(thinker: str, dit: str, through: str) -> None:
    chosen = f"mooncake (configured: tcp, this host is 127.0.0.1{through})"
    assert str(choose(DeployConfig("c", connector="mooncake"), thinker, dit)) == chosen


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_files_to_start_from_serve_on_either_device(path: Path, device: str) -> None:
    """None forces the CPU on a machine with a GPU."""
    config = load(path, "checkpoint")
    assert (config.device, config.dtype) == ("auto", "auto")
    choice = choose(config, device)
    if config.connector == "auto":
        assert choice == choose(DeployConfig("checkpoint", config.pipeline), device)
    else:
        assert choice.name == config.connector


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        (DeployConfig("c", connector="shm"), "cuda:0", "connector='shm' is for stages on a CPU; cuda:0 needs cuda_ipc"),
        (DeployConfig("c", connector="cuda_ipc"), "cpu", "connector='cuda_ipc' needs stages on CUDA; they are on cpu"),
        (DeployConfig("c", connector="mooncake_store"), "cpu", "'mooncake_store' needs extra.master, the HOST:PORT"),
        (DeployConfig("c", "bagel_single_stage", connector="shm"), "cpu", "is one process; use auto"),
    ],
)
def test_a_connector_that_cannot_carry_contexts_there_is_refused(
    config: DeployConfig, device: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(config, device)


@pytest.mark.parametrize(
    ("name", "connector"),
    [
        ("SharedMemoryConnector", "shm"),
        ("CudaIpcConnector", "cuda_ipc"),
        ("MooncakeConnector", "mooncake_store"),
        ("MooncakeStoreConnector", "mooncake_store"),
        ("MooncakeTransferEngineConnector", "mooncake"),
        ("auto", "auto"),
    ],
)
def test_the_names_that_deploy_files_carry(tmp_path: Path, name: str, connector: str) -> None:
    config = _load(tmp_path, f"connectors: {{one: {{name: {name}}}}}")
    assert config.connector == connector
    config.write(tmp_path / "written.yaml")


def test_a_file_without_connectors_chooses_by_the_device(tmp_path: Path) -> None:
    assert _load(tmp_path, "pipeline: bagel").connector == "auto"


def test_options_are_typed(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        """
        stages:
          - {stage_id: 0, output_connectors: {to_stage_1: net}}
          - {stage_id: 1, input_connectors: {from_stage_0: net}}
        connectors:
          unused: {name: SharedMemoryConnector}
          net:
            name: MooncakeTransferEngineConnector
            extra: {host: 10.0.0.7, protocol: rdma, device_name: mlx5_0, timeout_s: 3}
        """,
    )
    assert config.connector == "mooncake"
    assert config.mooncake == MooncakeConfig("10.0.0.7", "rdma", "mlx5_0", 3)


def test_the_stores_options_are_understood(tmp_path: Path) -> None:
    options = "host: 10.0.0.7, master: '10.0.0.1:50051', segment: 1024, localbuf: 64, proto: rdma"
    config = _load(tmp_path, f"connectors: {{net: {{name: MooncakeStoreConnector, extra: {{{options}}}}}}}")
    expected = MooncakeStoreConfig("10.0.0.7", "rdma", master="10.0.0.1:50051", segment=1024, localbuf=64)
    assert config.mooncake_store == expected
    written = tmp_path / "written.yaml"
    config.write(written)
    assert read(written).mooncake_store == expected


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        ("{name: Carrier}", r"connectors.net.name='Carrier' is not allowed; allowed: auto, shm, SharedMemoryConnector"),
        (
            "{name: shm, extra: {shm_threshold_bytes: -1}}",
            r"connectors.net.extra.shm_threshold_bytes=-1 is not allowed",
        ),
        (
            "{name: MooncakeTransferEngineConnector, extra: {host: 10.0.0.7, master: '10.0.0.1:50051'}}",
            r"extra.master='10.0.0.1:50051' is not supported: of MooncakeStoreConnector; this one reads the thinker's",
        ),
        (
            "{name: MooncakeStoreConnector, extra: {role: both}}",
            r"extra.role='both' is not supported: the thinker always lends .*; allowed: sender, receiver",
        ),
        ("{name: mooncake_store, extra: {master: here}}", r"extra.master='here' is not allowed; allowed: HOST:PORT"),
        ("{name: mooncake_store, extra: {localbuf: 0}}", r"extra.localbuf=0 is not allowed; allowed: bytes > 0"),
        ("{name: mooncake, extra: {memory_pool_device: cuda}}", r"memory_pool_device='cuda' is not supported: the KV"),
        ("{name: shm, extra: {host: here}}", r"connectors.net.extra.host is not a known field; allowed: memory_pool_"),
        (
            "{name: mooncake, extra: {host: 0.0.0.0}}",
            r"extra.host='0.0.0.0' is not allowed; allowed: an address of this",
        ),
        ("{name: mooncake, extra: {protocol: udp}}", r"extra.protocol='udp' is not allowed; allowed: tcp, rdma"),
        ("{name: mooncake, extra: {proto: udp}}", r"extra.proto='udp' is not allowed; allowed: tcp, rdma"),
        ("{name: mooncake, extra: {hots: here}}", r"extra.hots is not a known field; did you mean host\?"),
        ("{name: mooncake, extra: {timeout_s: 0}}", r"extra.timeout_s=0 is not allowed; allowed: whole seconds >= 1"),
    ],
)
def test_what_a_connector_does_not_take_is_refused_with_the_reason(
    tmp_path: Path, connector: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, f"connectors: {{net: {connector}}}")


def test_options_that_change_nothing_are_taken(tmp_path: Path) -> None:
    options = "host: auto, zmq_port: 50051, memory_pool_size: 4294967296, memory_pool_device: cpu, role: sender"
    config = _load(tmp_path, f"connectors: {{net: {{name: MooncakeTransferEngineConnector, extra: {{{options}}}}}}}")
    assert (config.connector, config.mooncake) == ("mooncake", MooncakeConfig())


def test_a_connector_that_no_stage_names_may_be_any(tmp_path: Path) -> None:
    text = """
        stages:
          - {stage_id: 0, output_connectors: {to_stage_1: a}}
        connectors: {a: {name: shm}, b: {name: YuanrongConnector, extra: {host: here}}}
        """
    assert _load(tmp_path, text).connector == "shm"


def test_two_connectors_in_use_are_refused(tmp_path: Path) -> None:
    text = """
        stages:
          - {stage_id: 0, output_connectors: {to_stage_1: a}}
          - {stage_id: 1, input_connectors: {from_stage_0: b}}
        connectors: {a: {name: shm}, b: {name: mooncake}}
        """
    with pytest.raises(ConfigError, match=r"from_stage_0 is a second connector \(a and b\): one carries KV"):
        _load(tmp_path, text)


def test_one_process_hands_over_within_itself() -> None:
    thinker = ThinkerConfig(kv_tokens=10, block_tokens=GEOMETRY.block_tokens)
    config = DeployConfig("c", "bagel_single_stage", thinker=thinker)
    producer = open_producer(config, GEOMETRY, torch.device("cpu"))
    assert isinstance(producer, LocalProducer)
    assert producer.pool.capacity == 12  # whole blocks
    assert isinstance(open_consumer(config, torch.device("cpu")), LocalConsumer)
    producer.close()
