"""The typed configuration that the supervisor writes and every stage reads.

A running server's stages find it through ``BAGEL_TRITON_DEPLOY`` (path of a YAML
file). Where no supervisor wrote one, as in a plain tritonserver container,
``BAGEL_TRITON_CHECKPOINT`` alone is enough and everything else has its default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from bagel_triton.deploy.topology import ORCHESTRATOR, TOPOLOGIES, Topology
from bagel_triton.protocol.request import Modality

# The forms of bagel_triton.model.quantization.FORMS, which imports torch.
Load = Literal["all", "understanding", "generation"]  # as bagel_triton.model.slim, which imports torch
WorkerBackend = Literal["process", "ray"]
Quantization = Literal["int8", "int8_w8a8", "fp8", "fp8_w8a8", "int4", "nf4"]
DEPLOY_VARIABLE = "BAGEL_TRITON_DEPLOY"
ALL_LAYERS_GB = 1024.0  # of ``cpu_offload_gb``: more than any checkpoint has
MIN_BLOCKS = 8  # of a KV pool that is shared between processes: what the connector's self-test takes
CHECKPOINT_VARIABLE = "BAGEL_TRITON_CHECKPOINT"


class ConfigError(ValueError):
    """A configuration value is missing or not allowed; the message names both."""


def _require(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ConfigError(f"{name}={value!r} is not allowed; allowed: {allowed}")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host, int(port)


class ThinkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The autoregressive stage.

    ``max_num_seqs`` bounds the requests in flight, ``max_num_batched_tokens`` the tokens
    of one packed forward, ``max_waiting`` the queued requests, ``kv_tokens`` the KV pool. An
    unclaimed lease expires after ``lease_ttl_s`` seconds; a request that finds the pool full
    waits at most ``admission_timeout_s``. With ``enable_prefix_caching``, free blocks of the
    pool keep prefixes for later requests; ``encoder_cache_mb`` megabytes keep the encoders'
    outputs for images. With a ``gpu_memory_utilization`` the server sizes the pool on a GPU, to
    ``kv_tokens`` at least. With ``enforce_eager`` a GPU decodes without CUDA graphs. ``quantization`` is the form of
    the transformer's weights; None for those of ``dtype``. ``cpu_offload_gb`` GiB of them stay in the host's memory
    and are copied to the device a layer at a time. ``tensor_parallel_size`` ranks share its heads.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 8192
    kv_tokens: int = 32768
    block_tokens: int = 16
    lease_ttl_s: float = 60.0
    admission_timeout_s: float = 60.0
    max_waiting: int = 256
    enable_prefix_caching: bool = True
    encoder_cache_mb: int = 256
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    quantization: Quantization | Literal["auto"] | None = None
    cpu_offload_gb: float = 0.0
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        sizes = ("kv_tokens", "block_tokens", "max_waiting", "tensor_parallel_size")
        for name in ("max_num_seqs", "max_num_batched_tokens", *sizes):
            value = getattr(self, name)
            _require(f"thinker.{name}", value, value >= 1, "an integer >= 1")
        _require("thinker.cpu_offload_gb", self.cpu_offload_gb, self.cpu_offload_gb >= 0, "GiB >= 0")
        _require("thinker.encoder_cache_mb", self.encoder_cache_mb, self.encoder_cache_mb >= 0, "an integer >= 0")
        for name in ("lease_ttl_s", "admission_timeout_s"):
            value = getattr(self, name)
            _require(f"thinker.{name}", value, value > 0, "seconds > 0")

    @property
    def ranks(self) -> int:
        """Processes that compute the stage's forwards, this one included."""
        return self.tensor_parallel_size

    @property
    def max_model_len(self) -> int:
        """Tokens of context and of text that any request for one text may have together.

        Of the pool's blocks a request reserves one for a copy, one that its context may leave half empty, and a
        token more than it decodes.
        """
        blocks = -(-self.kv_tokens // self.block_tokens)
        return max((blocks - 2) * self.block_tokens - 1, 1)


def pool_tokens(length: int, block_tokens: int) -> int:
    """The least ``kv_tokens`` with which ``max_model_len`` is ``length``."""
    return (-(-(length + 1) // block_tokens) + 2) * block_tokens


class DitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The flow stage.

    ``max_num_seqs`` bounds the images denoised together, ``max_num_batched_tokens`` the
    tokens of a step over all their branches (a request that is alone may exceed both),
    ``max_waiting`` the queued requests. ``gpu_memory_utilization`` is the part of a GPU that this
    stage and the decoder may take. With ``enforce_eager`` a GPU denoises without CUDA graphs. Stages with the same
    ``quantization`` share their weights. ``cpu_offload_gb`` is as the thinker's. The ranks of a stage share its heads
    (``tensor_parallel_size``), its images' branches (``cfg_parallel_size``), or a step's rows (``ulysses_degree``).
    With ``use_hsdp`` each of ``hsdp_shard_size`` ranks, -1 for all, keeps a part of the weights, in
    ``hsdp_replicate_size`` groups; where no other size says what they compute, they share the branches.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 65536
    max_waiting: int = 256
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    quantization: Quantization | Literal["auto"] | None = None
    cpu_offload_gb: float = 0.0
    tensor_parallel_size: int = 1
    cfg_parallel_size: int = 1
    ulysses_degree: int = 1
    use_hsdp: bool = False
    hsdp_shard_size: int = -1
    hsdp_replicate_size: int = 1

    def __post_init__(self) -> None:
        sizes = ("tensor_parallel_size", "cfg_parallel_size", "ulysses_degree", "hsdp_replicate_size")
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting", *sizes):
            value = getattr(self, name)
            _require(f"dit.{name}", value, value >= 1, "an integer >= 1")
        _require("dit.cpu_offload_gb", self.cpu_offload_gb, self.cpu_offload_gb >= 0, "GiB >= 0")
        shards = self.hsdp_shard_size
        _require("dit.hsdp_shard_size", shards, shards >= 1 or shards == -1, "an integer >= 1, or -1 for all ranks")

    @property
    def ranks(self) -> int:
        """Processes that compute the stage's forwards, this one included."""
        return self.tensor_parallel_size * self.cfg_ranks * self.ulysses_degree

    @property
    def cfg_ranks(self) -> int:
        """Groups of ranks that have branches of their own."""
        if self.use_hsdp and self.cfg_parallel_size * self.ulysses_degree == 1:
            return max(self.hsdp_shard_size, 1) * self.hsdp_replicate_size
        return self.cfg_parallel_size

    @property
    def shards(self) -> int:
        """Ranks that have a part each of one copy of the weights; 1 where each has all."""
        if not self.use_hsdp:
            return 1
        return self.hsdp_shard_size if self.hsdp_shard_size > 0 else max(self.ranks // self.hsdp_replicate_size, 1)


class VaeDecodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decoder stage.

    ``max_batch_size`` bounds images of one size decoded together, ``max_waiting`` the
    queued images. With ``use_tiling`` an image above 512x512 pixels is decoded strip by
    strip, in a fraction of the memory. None leaves that to the server: it decodes whole on a
    GPU whose memory has room for it by the plan at the start, and in strips elsewhere.
    ``patch_parallel_size`` ranks share the rows of every image, in strips.
    """

    max_batch_size: int = 4
    max_waiting: int = 1024
    use_tiling: bool | None = None
    patch_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_waiting", "patch_parallel_size"):
            value = getattr(self, name)
            _require(f"vae_decode.{name}", value, value >= 1, "an integer >= 1")


Policy = Literal["least-outstanding-tokens", "least-queue-length", "round-robin", "random"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class BagelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The orchestrator.

    A stage silent for ``stage_timeout_s`` is treated as dead; ``request_timeout_s`` is for requests
    without a ``timeout``. ``lb_policy`` shares requests among the servers of stage 1, where it has several.
    ``while_asleep`` is what becomes of requests that come while the server sleeps.
    """

    max_inflight: int = 256
    stage_timeout_s: float = 600.0
    request_timeout_s: float = 3600.0
    lb_policy: Policy = "least-outstanding-tokens"
    while_asleep: Literal["wait", "refuse"] = "wait"

    def __post_init__(self) -> None:
        _require("bagel.max_inflight", self.max_inflight, self.max_inflight >= 1, "an integer >= 1")
        for name in ("stage_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            _require(f"bagel.{name}", value, value > 0, "seconds > 0")


class MooncakeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the ``mooncake`` connector.

    ``host`` is the address at which the other stage's host reaches this one. With ``protocol``
    "rdma", ``device_name`` lists the cards, comma-separated; empty means any. A peer that is
    silent for ``timeout_s`` during a transfer is treated as dead.
    """

    host: str = "127.0.0.1"
    protocol: Literal["tcp", "rdma"] = "tcp"
    device_name: str = ""
    timeout_s: int = 5

    def __post_init__(self) -> None:
        _require("mooncake.host", self.host, self.host not in ("", "auto", "0.0.0.0", "::"), "an address of this host")
        _require("mooncake.timeout_s", self.timeout_s, self.timeout_s >= 1, "whole seconds >= 1")


class MooncakeStoreConfig(MooncakeConfig, frozen=True, forbid_unknown_fields=True):
    """Options of the ``mooncake_store`` connector: a ``mooncake_master`` at ``master``, HOST:PORT.

    The thinker gives the store ``segment`` bytes of its memory (0: a quarter more than its KV pool),
    and each process keeps ``localbuf`` bytes for small objects. ``metadata_server`` is Mooncake's;
    P2PHANDSHAKE does without one.
    """

    master: str = ""
    metadata_server: str = "P2PHANDSHAKE"
    segment: int = 0
    localbuf: int = 16 << 20

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("mooncake_store.segment", self.segment, self.segment >= 0, "bytes >= 0")
        _require("mooncake_store.localbuf", self.localbuf, self.localbuf > 0, "bytes > 0")
        host, _, port = self.master.rpartition(":")
        valid = not self.master or bool(host and port.isdigit())
        _require("mooncake_store.master", self.master, valid, "HOST:PORT of a mooncake_master")

    def segment_of(self, pool: int) -> int:
        """Bytes that the thinker gives the store, beside a KV pool of ``pool`` bytes."""
        return self.segment or pool * 5 // 4


class DeployConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The configuration of one server, equal for all of its stages.

    ``pipeline`` names the topology. ``shm_prefix`` starts the name of every shared-memory file of this server, so that
    leftovers can be found and removed. ``connector`` carries keys and values from stage to stage.
    ``load`` says which parts of the weights are loaded: with "understanding" those for answers in text, with
    "generation" those that a server of stage 1 needs.
    ``lora_path`` is the folder of a LoRA adapter that is merged into the weights, times ``lora_scale``; empty for none.
    ``lora_modules`` are the folders of adapters that requests may name, by name; others may be loaded while the server
    runs from below the folder ``lora_dir``, if there is one. There is memory kept for ``max_loras`` in all then, of
    the rank ``max_lora_rank``, above which one is refused; by default for one, and no rank is.
    ``max_generated_image_size`` are the pixels of the largest square image, where that is not the checkpoint's.
    ``worker_backend`` starts the ranks of a stage but the first: as child processes, or as actors of the Ray cluster at
    ``ray_address``, HOST:PORT; "auto" is that of this host.
    ``stage_id`` is set on a server of one stage; ``addresses`` are the gRPC addresses, HOST:PORT, of the servers of
    stages that have their own, by stage id. ``dit_device`` is the device of stage 1 where that is not ``device``.
    ``rank_devices`` are those of a stage's ranks, by stage id, where they are not the stage's and the ones after.
    ``text_defaults`` and ``image_defaults`` are values of request fields for requests of that kind that leave them out.
    """

    checkpoint: str
    pipeline: str = "bagel"
    shm_prefix: str = "bagel_triton"
    device: str = "auto"
    dit_device: str | None = None
    rank_devices: dict[int, tuple[str, ...]] = {}
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    load: Load = "all"
    lora_path: str = ""
    lora_scale: float = 1.0
    lora_modules: dict[str, str] = {}
    lora_dir: str = ""
    max_loras: int | None = None
    max_lora_rank: int | None = None
    max_generated_image_size: int | None = None
    connector: Literal["auto", "shm", "cuda_ipc", "mooncake", "mooncake_store"] = "auto"
    mooncake: MooncakeConfig = MooncakeConfig()
    mooncake_store: MooncakeStoreConfig = MooncakeStoreConfig()
    thinker: ThinkerConfig = ThinkerConfig()
    dit: DitConfig = DitConfig()
    vae_decode: VaeDecodeConfig = VaeDecodeConfig()
    bagel: BagelConfig = BagelConfig()
    worker_backend: WorkerBackend = "process"
    ray_address: str = "auto"
    stage_id: int | None = None
    addresses: dict[int, tuple[str, ...]] = {}
    text_defaults: dict[str, Any] = {}
    image_defaults: dict[str, Any] = {}

    def __post_init__(self) -> None:
        _require("pipeline", self.pipeline, self.pipeline in TOPOLOGIES, ", ".join(TOPOLOGIES))
        if self.load == "understanding" and (self.topology.one_process or self.stage_id is not None or self.addresses):
            raise ConfigError(
                "load='understanding' is not allowed with pipeline bagel_single_stage or stages on hosts of their own; "
                "allowed: pipeline bagel or bagel_think on one host, where no DiT is loaded"
            )

    @property
    def topology(self) -> Topology:
        """The topology that ``pipeline`` names."""
        return TOPOLOGIES[self.pipeline]

    @property
    def adapter(self) -> tuple[str, float] | None:
        """The LoRA adapter's folder and scale; None for none."""
        return (self.lora_path, self.lora_scale) if self.lora_path else None

    @property
    def decoder(self) -> VaeDecodeConfig:
        """The decoder's, which decodes no more images together than are denoised together."""
        most = min(self.vae_decode.max_batch_size, self.dit.max_num_seqs)
        return msgspec.structs.replace(self.vae_decode, max_batch_size=most)

    @property
    def models(self) -> tuple[str, ...]:
        """The Triton models that this server loads."""
        if self.load == "understanding":
            return self.topology.models_of(0)
        return self.topology.models if self.stage_id is None else self.topology.models_of(self.stage_id)

    def device_of(self, model: str) -> str:
        """The device of a Triton model."""
        on_stage_1 = not self.topology.one_process and model in self.topology.stages[1]
        return self.dit_device if on_stage_1 and self.dit_device is not None else self.device

    def rank_device_of(self, model: str, rank: int) -> str:
        """The device of a rank of a Triton model: on a GPU that after its neighbour's, where none are named.

        The stage's own device must be known, and not "auto".
        """
        own = (number for number, models in enumerate(self.topology.stages) if model in models)
        stage_id = 0 if self.topology.one_process else next(own)
        first = self.device_of(model)
        kind, _, index = first.partition(":")
        assert kind != "auto", "it is resolved before"
        if kind != "cuda":
            return first
        if listed := self.rank_devices.get(stage_id):
            return listed[rank]
        return f"cuda:{int(index or 0) + rank}"

    @property
    def control_model(self) -> str:
        """The model of this server that watches its supervisor's file: see :mod:`bagel_triton.ipc.control_file`."""
        return ORCHESTRATOR if ORCHESTRATOR in self.models else self.models[0]

    @property
    def own_address(self) -> tuple[str, int] | None:
        """Host and port at which another server calls this one; None where none does."""
        own = None if self.stage_id is None else self.addresses.get(self.stage_id)
        return None if own is None else split_address(own[0])

    @property
    def remote_models(self) -> tuple[str, ...]:
        """The models that this server's orchestrator calls elsewhere."""
        others = self.topology.stages[1:] if self.stage_id == 0 else ()
        return tuple(model for models in others for model in models)

    @property
    def remote_addresses(self) -> tuple[str, ...]:
        """The servers that have them; those that register later are not among them."""
        return self.addresses.get(1, ()) if self.remote_models else ()

    @property
    def request_defaults(self) -> dict[Modality, dict[str, Any]]:
        """Values for fields that a request leaves out, by the kind of output."""
        return {"text": self.text_defaults, "image": self.image_defaults}

    def write(self, path: Path) -> None:
        """Write as YAML."""
        path.write_bytes(msgspec.yaml.encode(self))


def read(path: Path) -> DeployConfig:
    """The configuration in the YAML file ``path``.

    Raises:
        ConfigError: not readable, unknown field, wrong type, value out of range.
    """
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=DeployConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"deploy configuration {path}: {error}") from error


def from_environment(environ: Mapping[str, str] = os.environ) -> DeployConfig:
    """The configuration of the server this process belongs to.

    Raises:
        ConfigError: neither variable is set, or the file is not valid.
    """
    if path := environ.get(DEPLOY_VARIABLE):
        return read(Path(path))
    if checkpoint := environ.get(CHECKPOINT_VARIABLE):
        return DeployConfig(checkpoint=checkpoint)
    raise ConfigError(f"set {CHECKPOINT_VARIABLE} to a checkpoint folder, or {DEPLOY_VARIABLE} to a deploy YAML")
