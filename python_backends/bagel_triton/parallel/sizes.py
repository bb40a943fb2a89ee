"""Checks numbers of ranks against a model and a configuration; without torch, for the command line before a start."""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

from bagel_triton.deploy.config import ConfigError, DeployConfig, DitConfig, ThinkerConfig
from bagel_triton.deploy.topology import DECODER, DIT, THINKER
from bagel_triton.model.config import LanguageConfig

MOST = 64  # of the sizes that an error lists
WORDS = {
    "cfg": "the branches of guidance",
    "ulysses": "the rows",
    "tensor": "the heads",
    "patch": "the rows of an image to decode",
    "shard": "the weights",
}


class Sizes(NamedTuple):
    """A stage's mesh: ``cfg`` groups of ranks with sequences of their own; in each, ``ulysses`` that share the rows.

    Each of those is ``tensor`` ranks that share the heads. Or ``patch`` ranks share the rows of an image to decode.
    Of all ranks, ``shard`` adjacent ones keep a part each of one copy of the weights.
    """

    cfg: int = 1
    ulysses: int = 1
    tensor: int = 1
    patch: int = 1
    shard: int = 1

    @classmethod
    def of(cls, config: DeployConfig, stage: str) -> Sizes:
        """Those of the Triton model ``stage``, :data:`THINKER`, :data:`DIT` or :data:`DECODER`."""
        if stage == DECODER:
            return cls(patch=config.vae_decode.patch_parallel_size)
        if stage == THINKER:
            return cls(tensor=config.thinker.tensor_parallel_size)
        dit = config.dit
        return cls(dit.cfg_ranks, dit.ulysses_degree, dit.tensor_parallel_size, shard=dit.shards)

    @property
    def ranks(self) -> int:
        """All of the mesh."""
        return self.cfg * self.ulysses * self.tensor * self.patch

    @property
    def cut(self) -> bool:
        """Whether a rank keeps a part of the weights."""
        return self.tensor * self.shard > 1

    def place(self, rank: int) -> Sizes:
        """A transformer's rank's index in each dimension; neighbours share heads."""
        others, tensor = divmod(rank, self.tensor)
        return Sizes(*divmod(others, self.ulysses), tensor, 0, rank % self.shard)

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self._asdict().items() if size > 1)


def kv_heads_of(config: LanguageConfig, rank: int, ranks: int) -> slice:
    """The KV heads of a rank; where there are fewer than ranks, several ranks have the same one."""
    per_rank = max(config.num_kv_heads // ranks, 1)
    first = rank * config.num_kv_heads // ranks
    return slice(first, first + per_rank)


def divides_heads(config: LanguageConfig, ranks: int) -> bool:
    """Whether ``ranks`` can share the heads.

    A rank has whole heads, and the KV heads that they read: several, or one that other ranks have as well.
    """
    kv_heads = config.num_kv_heads
    return config.num_heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def divides(config: LanguageConfig, ranks: int) -> bool:
    """Whether they can share the heads and the feed-forward."""
    return divides_heads(config, ranks) and config.intermediate_size % ranks == 0


def summary(config: DeployConfig) -> str:
    """The ranks of the stages that this server has, in words; empty where each has one."""
    found = []
    for stage in (THINKER, DIT, DECODER):
        sizes = Sizes.of(config, stage)
        if stage in config.models or config.topology.one_process:
            shared = " and ".join(f"{WORDS[name]} ({size})" for name, size in sizes._asdict().items() if size > 1)
            if shared:
                devices = [config.rank_device_of(stage, rank) for rank in range(sizes.ranks)]
                where = f"NCCL, on {', '.join(devices)}" if devices[0] != devices[1] else "gloo"
                found.append(f"{stage}: {sizes.ranks} processes share {shared}, by {where}")
    if found and config.worker_backend == "ray":
        found.append(f"all but the first of a stage are actors of the Ray cluster at {config.ray_address}")
    return "; ".join(found)


def check(config: DeployConfig, language: LanguageConfig) -> None:
    """Refuse ranks that the checkpoint or another setting does not allow.

    Raises:
        ConfigError: names the field, its value, and what is allowed.
    """
    ranks = max(Sizes.of(config, stage).ranks for stage in (THINKER, DIT, DECODER))
    if config.worker_backend == "ray" and ranks > 1 and find_spec("ray") is None:
        raise ConfigError(
            "worker_backend='ray' is not allowed: the package ray is not installed: pip install 'bagel-triton[ray]'; "
            "allowed: process"
        )
    _check_stage("thinker", config.thinker, config, language)
    _check_stage("dit", config.dit, config, language)
    _check_decoder(config)
    if config.topology.one_process:
        check_one_process(config)


def check_one_process(config: DeployConfig) -> None:
    """Refuse ranks of the stages that cannot be one group, where all stages are in one process.

    Raises:
        ConfigError: names the sizes.
    """
    thinker, dit, decoder = (Sizes.of(config, stage) for stage in (THINKER, DIT, DECODER))
    if min(thinker.ranks, dit.ranks) > 1 and thinker.tensor != dit.tensor:
        raise ConfigError(f"in one process the DiT's ranks, {dit}, must be those of the thinker, {thinker}")
    ranks = max(thinker.ranks, dit.ranks)
    if 1 < ranks < decoder.patch:
        raise ConfigError(
            f"vae_patch_parallel_size={decoder.patch} is not allowed in one process: the other stages have {ranks} "
            f"ranks, which decode as well; allowed: 1 to {ranks}"
        )


def _check_hsdp(dit: DitConfig) -> None:
    """Refuse sizes of HSDP that do not make the DiT's ranks."""
    shard, replicate = dit.hsdp_shard_size, dit.hsdp_replicate_size
    if not dit.use_hsdp:
        for name in ("hsdp_shard_size", "hsdp_replicate_size"):
            if getattr(dit, name) > 1:
                raise ConfigError(f"dit.{name}={getattr(dit, name)} is not allowed without use_hsdp: true; allowed: 1")
        return
    if dit.tensor_parallel_size > 1:
        raise ConfigError(
            f"dit.use_hsdp=true with tensor_parallel_size={dit.tensor_parallel_size} is not supported: each has its "
            "own way to cut the weights; set one of them"
        )
    if dit.ranks == 1:
        raise ConfigError(
            "dit.use_hsdp=true is not allowed for one rank; set hsdp_shard_size, cfg_parallel_size or ulysses_degree"
        )
    if dit.shards * replicate != dit.ranks:
        raise ConfigError(
            f"dit.hsdp_shard_size={shard} with hsdp_replicate_size={replicate} is not allowed for the {dit.ranks} "
            "ranks of cfg_parallel_size and ulysses_degree; allowed: sizes whose product is that"
        )


def _check_decoder(config: DeployConfig) -> None:
    ranks = config.vae_decode.patch_parallel_size
    field = f"vae_patch_parallel_size={ranks}"
    if ranks == 1:
        return
    if config.load == "understanding":
        raise ConfigError(f"{field} with load=understanding is not supported: nothing is drawn; set one of them")
    if config.vae_decode.use_tiling is False:
        raise ConfigError(
            f"{field} with vae_use_tiling=false is not supported: ranks decode in strips; leave vae_use_tiling out"
        )


def _check_stage(
    stage: str, settings: ThinkerConfig | DitConfig, config: DeployConfig, language: LanguageConfig
) -> None:
    sizes = Sizes.of(config, stage)
    if isinstance(settings, DitConfig):
        _check_hsdp(settings)
    if sizes.ranks == 1:
        return
    tensor, ulysses = sizes.tensor, sizes.ulysses
    if isinstance(settings, DitConfig) and settings.use_hsdp:
        field = f"{stage}.use_hsdp=true"
    else:
        name = next(
            name
            for name in ("tensor_parallel_size", "ulysses_degree", "cfg_parallel_size")
            if getattr(settings, name, 1) > 1
        )
        field = f"{stage}.{name}={getattr(settings, name)}"
    if stage == "dit" and config.load == "understanding":
        raise ConfigError(f"{field} with load=understanding is not supported: nothing is drawn; set one of them")
    if config.lora_modules:
        raise ConfigError(
            f"{field} with lora_modules is not supported: ranks compute no adapters of requests; set one of them, or "
            "merge one adapter with lora_path"
        )
    if settings.cpu_offload_gb:
        raise ConfigError(
            f"{field} with cpu_offload_gb={settings.cpu_offload_gb:g} is not supported: each rank has its weights on "
            "the device; set one of them"
        )
    if tensor * ulysses * sizes.shard > 1 and settings.quantization is not None:
        cut = tensor * sizes.shard > 1
        why = "quantised weights are not cut" if cut else "ranks that share rows run plain modules"
        others = "set one of them, or cfg_parallel_size" if stage == "dit" else "set one of them"
        raise ConfigError(f"{field} with quantization={settings.quantization} is not supported: {why}; {others}")
    if not divides(language, tensor):
        allowed = ", ".join(str(size) for size in range(1, MOST + 1) if divides(language, size))
        raise ConfigError(
            f"{field} does not divide the checkpoint's {language.num_heads} heads, {language.num_kv_heads} KV heads "
            f"and feed-forward of {language.intermediate_size}; allowed: {allowed}"
        )
    if not divides_heads(language, tensor * ulysses):
        allowed = ", ".join(str(size) for size in range(1, MOST + 1) if divides_heads(language, tensor * size))
        beside = f" beside tensor_parallel_size={tensor}" if tensor > 1 else ""
        raise ConfigError(
            f"{stage}.ulysses_degree={ulysses}{beside} does not divide the checkpoint's {language.num_heads} heads and "
            f"{language.num_kv_heads} KV heads; allowed: {allowed}"
        )
