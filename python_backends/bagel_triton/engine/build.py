"""Builds the engines of a deploy configuration, and both ends of the connector that it chooses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from bagel_triton.deploy.config import ConfigError, DeployConfig
from bagel_triton.deploy.connector import choose
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.engine.dit.engine import DitEngine
from bagel_triton.engine.thinker.engine import ThinkerEngine, kv_geometry
from bagel_triton.engine.vae import DecoderEngine
from bagel_triton.ipc.adapters import AdapterTable
from bagel_triton.ipc.host_memory import host_memory
from bagel_triton.kv.connectors.base import Consumer, Producer
from bagel_triton.kv.connectors.local import LocalConsumer, LocalProducer
from bagel_triton.kv.connectors.shm import ShmConsumer, ShmProducer
from bagel_triton.kv.store import token_bytes
from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import CheckpointError, ModelConfig
from bagel_triton.model.cpu.thread_pool import release_intraop_threads
from bagel_triton.model.device import Placement, on_gpu, resolve
from bagel_triton.model.lora import LoraAdapter
from bagel_triton.model.tokenizer import Tokenizer
from bagel_triton.parallel.sizes import Sizes, check
from bagel_triton.protocol.adapters import folder_below
from bagel_triton.protocol.errors import InvalidRequest, StageUnavailable
from bagel_triton.protocol.messages import KVGeometry
from bagel_triton.telemetry.metrics import Metrics
from bagel_triton.weights.adapters import USUAL_RANK, adapter_bytes, files_state, largest_bytes, load_adapter
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.sharing import SharedWeights, shared_weights

if TYPE_CHECKING:
    from bagel_triton.parallel.group import RankGroup  # torch's distributed layer, where a stage has ranks

Module = TypeVar("Module", bound=torch.nn.Module)
log = logging.getLogger(__name__)
MIB = 1 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGE_WEIGHTS, MOST_BLOCK = 128 << 20, 32 << 20  # bytes of files; glibc maps larger blocks in any case


def set_up_heap(weights: int) -> None:
    """Have this process hold the memory that the plan says, unless the environment says otherwise.

    glibc gives each thread a heap of its own and keeps what was freed there. Engines and the CPU's threads each have
    their peak at another time, so together they held up to 30 % more than the memory plan says; now they share one.
    What is freed between blocks in use stays there, too: up to a third more again. So large blocks are mapped, and
    go when they are freed: see :func:`heap_limits`. ``weights`` are bytes of files.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is None:
        return
    if "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(M_ARENA_MAX, 1)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        block, kept = heap_limits(weights)
        mallopt(M_MMAP_THRESHOLD, block)
        mallopt(M_TRIM_THRESHOLD, kept)


def heap_limits(weights: int) -> tuple[int, int]:
    """Bytes from which on a block is mapped, and bytes that may stay free at the heap's end.

    The kernel clears the pages of a block each time that it is mapped, which takes as long as a product that fills
    it: mapped from 256 KiB on, an image took twice as long. So the limits are as large as the memory plan allows,
    a share of the ``weights``. A small model may have more.
    """
    block = min(weights // 256, MOST_BLOCK) if weights > LARGE_WEIGHTS else MOST_BLOCK // 4
    return block, 3 * block


def trim_heap() -> None:
    """Give what this process freed but glibc kept back to the system; nothing where the C library is another."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


@dataclass(frozen=True)
class StageResources:
    """The resources that every engine is built from; the caller of :meth:`open` closes them after the engine."""

    config: DeployConfig
    checkpoint: Checkpoint
    placement: Placement
    weights: SharedWeights | None  # None for weights of this process alone
    model: str = THINKER  # the Triton model that has them
    _loaded: dict[str, torch.nn.Module] = field(default_factory=dict)
    _adapters: dict[str, LoraAdapter] = field(default_factory=dict)

    @classmethod
    def open(cls, config: DeployConfig, model: str = THINKER) -> StageResources:
        """Check the checkpoint and resolve the placement of the Triton model ``model``; loads no weights."""
        for stage in (config.thinker, config.dit):
            if stage.quantization == "auto":
                raise ConfigError("quantization='auto' is chosen by bagel-triton serve; name a form, or leave it out")
        placement = resolve(config.device_of(model), config.dtype)
        weights = shared_weights(config.shm_prefix, placement.torch_device)
        checkpoint = Checkpoint(config.checkpoint, config.adapter, config.load, config.max_generated_image_size)
        set_up_heap(checkpoint.stored_bytes)
        return cls(config, checkpoint, placement, weights, model)

    def load_bagel(self, quantization: str | None, offload_gb: float = 0.0) -> Bagel:
        """The transformer, its weights shared with the server's other processes that quantise them alike.

        ``offload_gb`` GiB of them stay in the host's memory.
        """
        return self._once("bagel", lambda: self._bagel(quantization, offload_gb, cut=False))

    def model_of(self, stage: str) -> Bagel:
        """The transformer of the thinker or the DiT, as its ranks need it."""
        config = self.config.thinker if stage == THINKER else self.config.dit
        if Sizes.of(self.config, stage).cut:
            return self.own_bagel(config.quantization)
        return self.load_bagel(config.quantization, config.cpu_offload_gb)

    def own_bagel(self, quantization: str | None) -> Bagel:
        """The same, for ranks that cut it: it is not kept for the engine after a sleep, and on the host until then."""
        return self._bagel(quantization, 0.0, cut=True)

    def _bagel(self, quantization: str | None, offload_gb: float, cut: bool) -> Bagel:
        place = self.placement
        device, dtype = place.torch_device, place.torch_dtype
        model = self.checkpoint.load_bagel(device, dtype, self.weights, quantization, offload_gb, cut)
        release_intraop_threads()  # the engine computes on other threads
        return model

    def load_autoencoder(self) -> Autoencoder:
        """The autoencoder, shared likewise; it always computes in float32."""
        device, load = self.placement.torch_device, self.checkpoint.load_autoencoder
        return self._once("autoencoder", lambda: load(device, torch.float32, self.weights))

    def load_adapters(self) -> Mapping[str, LoraAdapter]:
        """The adapters that requests may name, by name, in memory of this process; :meth:`adapt` changes them.

        One that was loaded while the server ran, and whose files have changed since, is left out: other stages may
        still have what it was.
        """
        for name, (folder, state) in self._table.entries.items():
            if name not in self._adapters:
                try:
                    if state and files_state(folder) != state:
                        raise CheckpointError(f"the files in {folder} have changed since the adapter was loaded")
                    self._adapters[name] = self._load_adapter(name, folder)
                except CheckpointError as error:
                    if not state and name in self.config.lora_modules:
                        raise
                    log.error("the adapter %r is not loaded again: %s", name, error)
                    self._table.remove(name)
        return self._adapters

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of those that are loaded."""
        return tuple(self._adapters)

    def adapt(self, name: str, path: str) -> None:
        """Load the adapter ``name`` from ``path`` below the configuration's ``lora_dir``, for jobs from now on.

        With an empty ``path`` let go of it; jobs that have it keep it.

        Raises:
            InvalidRequest: it cannot be loaded, or this stage computes with none; the message says why.
        """
        if not path:
            self._table.remove(name)
            self._adapters.pop(name, None)
            return
        folder = folder_below(self.config.lora_dir, path)
        ranks = [Sizes.of(self.config, stage).ranks for stage in (THINKER, DIT)]
        if max(ranks) > 1:
            raise InvalidRequest(
                f"lora_path={path!r} is not allowed: ranks compute no adapters of requests; allowed: lora_path of the "
                "deploy configuration, which merges one",
                "lora_path",
            )
        try:
            self._check_memory(path, folder)
            state = files_state(folder)
            self._adapters[name] = self._load_adapter(name, folder)
        except CheckpointError as error:
            raise InvalidRequest(f"lora_path={path!r} is not allowed: {error}", "lora_path") from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise StageUnavailable(f"there is no memory for the adapter in {path!r}: {error}", "lora_path") from error
        self._table.add(name, folder, state)

    def _check_memory(self, path: str, folder: str) -> None:
        """Refuse an adapter that there is no memory for.

        A GPU's memory is planned at the start: memory that is free beside the adapters' is for activations.
        """
        # In float32 while it is read; where none of that were free, the kernel would end this process.
        needed, free, where = adapter_bytes(folder, torch.float32), host_memory(), "of the host's memory are free"
        if needed <= free and on_gpu(self.placement.torch_device):
            dtype, config = self.placement.torch_dtype, self.config
            needed = adapter_bytes(folder, dtype)
            later = max((config.max_loras or 1) - len(config.lora_modules), 0)
            largest = largest_bytes(self.checkpoint.config.language, config.max_lora_rank or USUAL_RANK, dtype)
            kept = later * largest + sum(adapter_bytes(given, dtype) for given in config.lora_modules.values())
            free = kept - sum(adapter.nbytes for adapter in self._adapters.values())
            where = f"are left of the {kept / MIB:.1f} MiB that the GPU has for adapters (max_loras, max_lora_rank)"
        if needed > free:
            sizes = f"it needs {needed / MIB:.1f} MiB, and {free / MIB:.1f} MiB {where}"
            raise StageUnavailable(f"there is no memory for the adapter in {path!r}: {sizes}", "lora_path")

    def _load_adapter(self, name: str, folder: str) -> LoraAdapter:
        place = self.placement
        language, rank = self.checkpoint.config.language, self.config.max_lora_rank
        adapter = load_adapter(name, folder, language, place.torch_device, place.torch_dtype, rank)
        release_intraop_threads()  # the engine computes on other threads
        return adapter

    @property
    def _table(self) -> AdapterTable:
        return AdapterTable(self.config.shm_prefix, self.model, self.config.lora_modules)

    def rest(self, level: int) -> bool:
        """Let a sleep of ``level`` begin, once no engine uses the weights; whether they stay loaded.

        They do at level 1 on a CPU. What stays of a GPU's are the checkpoint's pages in the host's page cache.
        """
        stays = level == 1 and self.placement.torch_device.type == "cpu"
        if not stays:
            self._loaded.clear()
            self._adapters.clear()
        gc.collect()  # an engine and its parts refer to each other
        if not stays:
            self.close()
            if self.weights is not None:
                self.weights.free()
            if on_gpu(self.placement.torch_device):
                torch.cuda.empty_cache()
                torch._C._host_emptyCache()  # pinned memory, such as that of lent contexts
        trim_heap()
        return stays

    def close(self) -> None:
        """Stop sharing the weights with processes that start later."""
        if self.weights is not None:
            self.weights.close()

    def _once(self, name: str, load: Callable[[], Module]) -> Module:
        module = self._loaded.get(name)
        if module is None:
            module = self._loaded[name] = load()
            release_intraop_threads()  # the engine computes on other threads
        return module  # type: ignore[return-value]

    @property
    def kv_geometry(self) -> KVGeometry:
        """The geometry of the thinker's KV cache."""
        block_tokens = self.config.thinker.block_tokens
        return kv_geometry(self.checkpoint.config.language, block_tokens, self.placement.dtype_name)

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return Tokenizer(Path(self.config.checkpoint), self.checkpoint.config.language.vocab_size)


def build_thinker(resources: StageResources, metrics: Metrics | None = None) -> ThinkerEngine:
    """The thinker, with a KV cache that the DiT can read."""
    config, place = resources.config, resources.placement
    producer = open_producer(config, resources.kv_geometry, place.torch_device)
    with contextlib.ExitStack() as unless_built:  # a process that could not wake is asked again
        unless_built.callback(producer.close)
        model = resources.model_of(THINKER)
        adapters = resources.load_adapters()
        autoencoder = None if config.load == "understanding" else resources.load_autoencoder()
        ranks = open_ranks(resources, THINKER, model, share=True)
        if ranks is not None:
            unless_built.callback(ranks.stop)
        parts = resources.tokenizer(), producer, config.thinker, metrics, adapters, ranks
        engine = ThinkerEngine(model, autoencoder, *parts)
        unless_built.pop_all()
    return engine


def build_dit(resources: StageResources, metrics: Metrics | None = None) -> DitEngine:
    """The DiT, reading the thinker's KV cache."""
    tokenizer = resources.tokenizer()
    consumer = open_consumer(resources.config, resources.placement.torch_device)
    vision_tokens = (tokenizer.vision_start, tokenizer.vision_end)
    kv_tokens = resources.config.thinker.kv_tokens if resources.config.stage_id is None else None
    with contextlib.ExitStack() as unless_built:
        unless_built.callback(consumer.close)
        model = resources.model_of(DIT)
        adapters = resources.load_adapters()
        ranks = open_ranks(resources, DIT, model, share=True)
        if ranks is not None:
            unless_built.callback(ranks.stop)
        parts = vision_tokens, resources.kv_geometry, kv_tokens, metrics, ranks, adapters
        engine = DitEngine(model, consumer, resources.config.dit, *parts)
        unless_built.pop_all()
    return engine


def open_ranks(
    resources: StageResources,
    stage: str,
    model: Bagel | None,
    share: bool,
    autoencoder: Autoencoder | None = None,
) -> RankGroup | None:
    """The ranks of the Triton model ``stage``, of which ``model`` becomes the first one's; None where it has one alone.

    With ``share`` they map the server's weights; without, each loads its own. With an ``autoencoder`` they decode too.
    """
    config = resources.config
    if Sizes.of(config, stage).ranks == 1:
        return None
    check(config, resources.checkpoint.config.language)
    from bagel_triton.parallel.group import RankGroup

    return RankGroup.start(config, stage, model, share, autoencoder)


def build_decoder(resources: StageResources, metrics: Metrics | None = None) -> DecoderEngine:
    """The decoder."""
    autoencoder, latent = resources.load_autoencoder(), resources.checkpoint.config.latent
    ranks = open_ranks(resources, DECODER, None, share=True, autoencoder=autoencoder)
    return DecoderEngine(autoencoder, latent, resources.config.decoder, metrics, ranks)


@dataclass(frozen=True)
class Models:
    """A checkpoint's networks, loaded."""

    config: ModelConfig
    bagel: Bagel
    autoencoder: Autoencoder

    @classmethod
    def load(cls, resources: StageResources, own: bool = False) -> Models:
        """Load them for this process alone; with ``own`` for a caller that changes the transformer."""
        alone = replace(resources, weights=None)
        thinker = resources.config.thinker
        quantization = thinker.quantization
        bagel = alone.own_bagel(quantization) if own else alone.load_bagel(quantization, thinker.cpu_offload_gb)
        return cls(resources.checkpoint.config, bagel, alone.load_autoencoder())


# A connector's library is imported only where that connector is chosen.


def open_producer(config: DeployConfig, geometry: KVGeometry, device: torch.device) -> Producer:
    """The thinker's end, with a pool of ``thinker.kv_tokens`` tokens.

    Raises:
        ConfigError: the connector does not fit the device.
        ConnectorUnavailable: it needs something that this machine does not have.
        MemoryError: the pool does not fit.
    """
    blocks = -(-config.thinker.kv_tokens // config.thinker.block_tokens)
    match choose(config, str(device), config.dit_device).name:
        case "local":
            return LocalProducer(geometry, blocks, device)
        case "shm":
            return ShmProducer(geometry, blocks, config.shm_prefix)
        case "cuda_ipc":
            from bagel_triton.kv.connectors.cuda_ipc import CudaIpcProducer

            return CudaIpcProducer(geometry, blocks, config.shm_prefix, device)
        case "mooncake":
            from bagel_triton.kv.connectors.mooncake import MooncakeProducer, TransferEngine

            return MooncakeProducer(geometry, blocks, config.shm_prefix, TransferEngine(config.mooncake), device)
        case "mooncake_store":
            from bagel_triton.kv.connectors.mooncake_store import MooncakeStoreProducer, ObjectStore

            pool = blocks * geometry.block_tokens * token_bytes(geometry)
            store = ObjectStore(config.mooncake_store, config.mooncake_store.segment_of(pool))
            return MooncakeStoreProducer(geometry, blocks, config.shm_prefix, store, device)


def open_consumer(config: DeployConfig, device: torch.device) -> Consumer:
    """The DiT's end; errors as for :func:`open_producer`."""
    thinkers = str(device) if config.dit_device is None else config.device
    match choose(config, thinkers, str(device)).name:
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
