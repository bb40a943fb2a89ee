"""The connector that carries keys and values from the thinker to the DiT: its names, its choice and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from bagel_triton.deploy.config import ConfigError, DeployConfig, MooncakeConfig, MooncakeStoreConfig

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
_RENAMED = {"proto": "protocol"}
_POINTLESS = {
    "shm_threshold_bytes": "keys and values always stay in shared memory, whatever their size",
    "memory_pool_size": "the KV pool's size is stages[].kv_tokens",
    "memory_pool_device": "the KV pool is in the host's memory",
    "zmq_port": "a lease is part of its request and needs no port",
    "role": "the thinker always lends and the DiT always reads",
}
_OF_THE_STORE = {
    "metadata_server": "the stages connect without a metadata server",
    "master": "the DiT reads the thinker's memory, without a store",
    "segment": "the KV pool's size is stages[].kv_tokens",
    "localbuf": "the reader's buffer grows as needed",
}
_MOONCAKE: dict[str, tuple[type[MooncakeConfig], dict[str, str]]] = {
    "mooncake": (MooncakeConfig, _POINTLESS | _OF_THE_STORE),
    "mooncake_store": (MooncakeStoreConfig, _POINTLESS),
}


class ConnectorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named connector of a deploy file, and its options."""

    name: str
    extra: dict[str, Any] = {}


@dataclass(frozen=True)
class ConnectorChoice:
    """A connector, and the reason for it as `serve` prints it."""

    name: Connector
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def connector_fields(where: str, spec: ConnectorSpec) -> dict[str, Any]:
    """The fields of :class:`DeployConfig` that ``spec``, found at ``where``, sets.

    Raises:
        ConfigError: an unknown name, or an option that is unknown, of the wrong type or
            without a meaning here; the message says why.
    """
    if spec.name not in NAMES:
        raise ConfigError(f"{where}.name={spec.name!r} is not allowed; allowed: {', '.join(NAMES)}")
    kind = NAMES[spec.name]
    config, pointless = _MOONCAKE.get(kind, (None, _POINTLESS))
    for option, value in spec.extra.items():
        if option in pointless:
            raise ConfigError(f"{where}.extra.{option}={value!r} has no meaning here: {pointless[option]}; remove it")
    if config is not None:
        options = {_RENAMED.get(option, option): value for option, value in spec.extra.items()}
        if options.get("host") == "auto":  # it is found out: see hosts.py
            del options["host"]
        try:
            return {"connector": kind, kind: msgspec.convert(options, config)}
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}.extra: {error}") from error
    if spec.extra:
        raise ConfigError(f"{where}.extra={spec.extra!r} is not allowed; {spec.name} takes no options")
    return {"connector": kind}


def choose(config: DeployConfig, device: str) -> ConnectorChoice:
    """The connector of a server whose stages run on ``device`` ("cpu", "cuda:0").

    Raises:
        ConfigError: the configured one does not work on that device.
    """
    on_gpu = device.partition(":")[0] == "cuda"
    if config.topology.one_process:
        if config.connector != "auto":
            raise ConfigError(f"connector={config.connector!r}: pipeline {config.pipeline} is one process; use auto")
        return ConnectorChoice("local", f"pipeline {config.pipeline} is one process")
    if config.connector == "auto":
        if on_gpu:
            return ConnectorChoice("cuda_ipc", f"auto: the stages share {device}")
        return ConnectorChoice("shm", "auto: the stages run on a CPU")
    if on_gpu and config.connector != "cuda_ipc":
        raise ConfigError(f"connector={config.connector!r} is for stages on a CPU; {device} needs cuda_ipc")
    if not on_gpu and config.connector == "cuda_ipc":
        raise ConfigError(f"connector='cuda_ipc' needs stages on CUDA; they are on {device}")
    if config.connector == "mooncake_store" and not config.mooncake_store.master:
        raise ConfigError("connector='mooncake_store' needs extra.master, the HOST:PORT of a mooncake_master")
    return ConnectorChoice(config.connector, f"configured: {_details(config)}")


def _details(config: DeployConfig) -> str:
    if config.connector == "mooncake":
        return f"{config.mooncake.protocol}, this host is {config.mooncake.host}"
    if config.connector == "mooncake_store":
        store = config.mooncake_store
        return f"{store.protocol}, this host is {store.host}, the store's master {store.master}"
    return "the stages share one host"
