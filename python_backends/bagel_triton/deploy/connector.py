"""The connector that carries keys and values from the thinker to the DiT: its names, its choice and the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bagel_triton.deploy.config import ConfigError, DeployConfig, MooncakeConfig, MooncakeStoreConfig
from bagel_triton.deploy.located import Node, Problems
from bagel_triton.deploy.vocabulary import CONNECTOR, Count, Fields, Neutral, Setting, Size, check
from bagel_triton.protocol.errors import format_value

Connector = Literal["local", "shm", "cuda_ipc", "mooncake", "mooncake_store"]
# Ours, and those of vLLM-Omni's deploy files.
NAMES: dict[str, str] = {
    "auto": "auto",
    "shm": "shm",
    "SharedMemoryConnector": "shm",
    "cuda_ipc": "cuda_ipc",
    "CudaIpcConnector": "cuda_ipc",
    "mooncake": "mooncake",
    "MooncakeTransferEngineConnector": "mooncake",
    "mooncake_store": "mooncake_store",
    "MooncakeConnector": "mooncake_store",
    "MooncakeStoreConnector": "mooncake_store",
}
_HOST = Annotated[str, Meta(pattern=r"^(?!0\.0\.0\.0$|::$)\S+$")]
_STORE = "of MooncakeStoreConnector; this one reads the thinker's memory without a store: remove it"
# Options that change nothing: a lease is part of its request, and the KV pool is the only memory.
_WITHOUT_EFFECT: Fields = {
    "memory_pool_device": Neutral("the KV pool of a connector between hosts is in the host's memory", ("cpu",)),
    "memory_pool_size": Neutral("bytes >= 0; the KV pool's size is stages[].kv_tokens", type=Size),
    "role": Neutral("the thinker always lends and the DiT always reads", ("sender", "receiver")),
    "shm_threshold_bytes": Neutral("bytes >= 0; KV always stay in shared memory, whatever their size", type=Size),
    "zmq_port": Neutral(
        "a port; a lease is part of its request and needs none", type=Annotated[int, Meta(ge=0, le=65535)]
    ),
}
_BETWEEN_HOSTS: Fields = {
    **_WITHOUT_EFFECT,
    "host": Setting(_HOST, "an address of this host, or auto", "as the other host reaches it"),
    "protocol": Setting(Literal["tcp", "rdma"], "tcp, rdma", "of the transfer"),
    "device_name": Setting(str, "RDMA devices, comma-separated, or an empty text for any", "RDMA devices"),
    "timeout_s": Setting(Count, "whole seconds >= 1", "silence after which the other host counts as dead"),
}
_MASTER = Annotated[str, Meta(pattern=r"^\S+:[0-9]+$")]
# The options of each connector, by its name here.
OPTIONS: dict[str, Fields] = {
    "auto": _WITHOUT_EFFECT,
    "shm": _WITHOUT_EFFECT,
    "cuda_ipc": _WITHOUT_EFFECT,
    "mooncake": {
        **_BETWEEN_HOSTS,
        "master": _STORE,
        "metadata_server": _STORE,
        "segment": _STORE,
        "localbuf": _STORE,
    },
    "mooncake_store": {
        **_BETWEEN_HOSTS,
        "master": Setting(_MASTER, "HOST:PORT of a mooncake_master", "the store's master"),
        "metadata_server": Setting(str, "a URL, or P2PHANDSHAKE", "Mooncake's metadata server"),
        "segment": Setting(Size, "bytes >= 0", "memory that the thinker gives to the store"),
        "localbuf": Setting(Annotated[int, Meta(gt=0, le=2**62)], "bytes > 0", "for small objects, of each process"),
    },
}
_RENAMED = {"proto": "protocol"}


@dataclass(frozen=True)
class ConnectorChoice:
    """A connector, and the reason for it as `serve` prints it."""

    name: Connector
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def connector_fields(connector: Node, problems: Problems, notes: list[str]) -> tuple[dict[str, Any], dict[str, Node]]:
    """The fields of :class:`DeployConfig` that ``connector`` of a file sets, and the node of each.

    Every error is noted: an unknown name, or an option that it does not have, or of the wrong value.
    """
    found = check(connector, CONNECTOR, problems, notes)
    if "name" not in found:
        if isinstance(connector.value, dict) and set(connector.value) <= set(CONNECTOR) - {"name"}:
            problems.add(connector, f".name is missing; allowed: {', '.join(NAMES)}")
        return {}, {}
    name = found["name"]
    if name.value not in NAMES:
        problems.add(name, f"={format_value(name.value)} is not allowed; allowed: {', '.join(NAMES)}")
        return {}, {}
    kind = NAMES[name.value]
    options: dict[str, Node] = {}
    if (extra := found.get("extra")) is not None:
        entries = dict(extra.mapping)
        for written, renamed in _RENAMED.items():
            if written in entries:
                entries[renamed] = entries.pop(written)
        options = check(replace(extra, value=entries), OPTIONS[kind], problems, notes)
    if "host" in options and options["host"].value == "auto":  # it is found out: see hosts.py
        del options["host"]
    nodes = {"connector": name, **{f"{kind}.{option}": node for option, node in options.items()}}
    config = {"mooncake": MooncakeConfig, "mooncake_store": MooncakeStoreConfig}.get(kind)
    if config is None or problems:
        return {"connector": kind}, nodes
    values = {option: node.plain() for option, node in options.items()}
    return {"connector": kind, kind: msgspec.convert(values, config)}, nodes


def choose(config: DeployConfig, device: str, dit_device: str | None = None) -> ConnectorChoice:
    """The connector of a server whose stages run on ``device`` ("cpu", "cuda:0"), the DiT on ``dit_device``.

    The KV pool is the thinker's, so its device decides; the DiT copies from there to its own, whatever that is.

    Raises:
        ConfigError: the configured one does not work on these devices.
    """
    on_gpu = device.partition(":")[0] == "cuda"
    other = device if dit_device is None else dit_device
    if config.topology.one_process:
        if config.connector != "auto":
            raise ConfigError(f"connector={config.connector!r}: pipeline {config.pipeline} is one process; use auto")
        return ConnectorChoice("local", f"pipeline {config.pipeline} is one process")
    if config.connector == "auto":
        if other != device:
            return ConnectorChoice("cuda_ipc" if on_gpu else "shm", f"auto: from {device} to {other}")
        if on_gpu:
            return ConnectorChoice("cuda_ipc", f"auto: the stages share {device}")
        return ConnectorChoice("shm", "auto: the stages run on a CPU")
    between_hosts = config.connector in ("mooncake", "mooncake_store")  # from any device, by way of the hosts' memory
    if on_gpu and not between_hosts and config.connector != "cuda_ipc":
        raise ConfigError(f"connector={config.connector!r} is for stages on a CPU; {device} needs cuda_ipc")
    if not on_gpu and config.connector == "cuda_ipc":
        raise ConfigError(f"connector='cuda_ipc' needs stages on CUDA; they are on {device}")
    if config.connector == "mooncake_store" and not config.mooncake_store.master:
        raise ConfigError("connector='mooncake_store' needs extra.master, the HOST:PORT of a mooncake_master")
    through = ", through the hosts' memory" if between_hosts and "cuda" in device + other else ""
    return ConnectorChoice(config.connector, f"configured: {_details(config)}{through}")


def _details(config: DeployConfig) -> str:
    if config.connector == "mooncake":
        return f"{config.mooncake.protocol}, this host is {config.mooncake.host}"
    if config.connector == "mooncake_store":
        store = config.mooncake_store
        return f"{store.protocol}, this host is {store.host}, the store's master {store.master}"
    return "the stages share one host"
