"""Both ends of the connector that a configuration chooses."""

from __future__ import annotations

import torch

from bagel_triton.deploy.config import DeployConfig
from bagel_triton.deploy.connector import choose
from bagel_triton.kv.connectors.base import Consumer, Producer
from bagel_triton.kv.connectors.local import LocalConsumer, LocalProducer
from bagel_triton.kv.connectors.shm import ShmConsumer, ShmProducer
from bagel_triton.kv.store import token_bytes
from bagel_triton.protocol.messages import KVGeometry

# A connector's library is imported only where that connector is chosen.


def open_producer(config: DeployConfig, geometry: KVGeometry, device: torch.device) -> Producer:
    """The thinker's end, with a pool of ``thinker.kv_tokens`` tokens.

    Raises:
        ConfigError: the connector does not fit the device.
        ConnectorUnavailable: it needs something that this machine does not have.
        MemoryError: the pool does not fit.
    """
    blocks = -(-config.thinker.kv_tokens // config.thinker.block_tokens)
    match choose(config, str(device)).name:
        case "local":
            return LocalProducer(geometry, blocks, device)
        case "shm":
            return ShmProducer(geometry, blocks, config.shm_prefix)
        case "cuda_ipc":
            from bagel_triton.kv.connectors.cuda_ipc import CudaIpcProducer

            return CudaIpcProducer(geometry, blocks, config.shm_prefix, device)
        case "mooncake":
            from bagel_triton.kv.connectors.mooncake import MooncakeProducer, TransferEngine

            return MooncakeProducer(geometry, blocks, config.shm_prefix, TransferEngine(config.mooncake))
        case "mooncake_store":
            from bagel_triton.kv.connectors.mooncake_store import MooncakeStoreProducer, ObjectStore

            pool = blocks * geometry.block_tokens * token_bytes(geometry)
            store = ObjectStore(config.mooncake_store, config.mooncake_store.segment_of(pool))
            return MooncakeStoreProducer(geometry, blocks, config.shm_prefix, store)


def open_consumer(config: DeployConfig, device: torch.device) -> Consumer:
    """The DiT's end; errors as for :func:`open_producer`."""
    match choose(config, str(device)).name:
        case "local":
            return LocalConsumer()
        case "shm":
            return ShmConsumer()
        case "cuda_ipc":
            from bagel_triton.kv.connectors.cuda_ipc import CudaIpcConsumer

            return CudaIpcConsumer()
        case "mooncake":
            from bagel_triton.kv.connectors.mooncake import MooncakeConsumer, TransferEngine

            return MooncakeConsumer(TransferEngine(config.mooncake))
        case "mooncake_store":
            from bagel_triton.kv.connectors.mooncake_store import MooncakeStoreConsumer, ObjectStore

            return MooncakeStoreConsumer(ObjectStore(config.mooncake_store))
