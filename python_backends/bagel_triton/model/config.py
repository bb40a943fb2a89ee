"""The geometry of a checkpoint, read from its configuration files and tensor shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bagel_triton.request import LATENT_STRIDE


class CheckpointError(ValueError):
    """The checkpoint is missing a file or tensor, or one does not fit the others."""


@dataclass(frozen=True)
class LanguageConfig:
    """The packed transformer: Qwen2 fields, grouped-query attention, two experts a layer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim={self.head_dim} is odd; rotary embedding needs an even one")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LanguageConfig:
        """From the fields of ``llm_config.json``; a missing one is a :class:`CheckpointError`."""
        try:
            heads = int(fields["num_attention_heads"])
            hidden = int(fields["hidden_size"])
            return cls(
                hidden_size=hidden,
                intermediate_size=int(fields["intermediate_size"]),
                num_layers=int(fields["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=int(fields["num_key_value_heads"]),
                head_dim=int(fields.get("head_dim") or hidden // heads),
                vocab_size=int(fields["vocab_size"]),
                rope_theta=float(fields["rope_theta"]),
                rms_norm_eps=float(fields["rms_norm_eps"]),
            )
        except KeyError as error:
            raise CheckpointError(f"llm_config.json has no field {error}") from error


@dataclass(frozen=True)
class LatentConfig:
    """The flow's tokens: patches of the autoencoder's latent.

    ``max_latent_size`` is the side of the position table, taken from its rows: the
    field of that name in ``config.json`` can be stale.
    """

    patch_size: int
    channels: int
    downsample: int
    max_latent_size: int

    @property
    def token_channels(self) -> int:
        """Numbers in one latent token."""
        return self.channels * self.patch_size**2

    @property
    def stride(self) -> int:
        """Pixels a latent token covers per side."""
        return self.downsample * self.patch_size

    @property
    def max_side(self) -> int:
        """Longest picture side in pixels."""
        return self.max_latent_size * self.stride

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], position_rows: int) -> LatentConfig:
        """From ``config.json`` and the rows of ``latent_pos_embed.pos_embed``."""
        side = round(position_rows**0.5)
        if side * side != position_rows:
            raise CheckpointError(f"latent_pos_embed.pos_embed has {position_rows} rows, which is no square")
        try:
            vae = fields["vae_config"]
            config = cls(int(fields["latent_patch_size"]), int(vae["z_channels"]), int(vae["downsample"]), side)
        except KeyError as error:
            raise CheckpointError(f"config.json has no field {error}") from error
        if config.stride != LATENT_STRIDE:
            raise CheckpointError(
                f"a latent token covers {config.stride} pixels a side; only {LATENT_STRIDE} is supported"
            )
        return config


@dataclass(frozen=True)
class VitConfig:
    """The SigLIP encoder. ``num_layers`` are those the checkpoint holds, one fewer than
    ``vit_config.json`` says; ``patches_per_side`` is the side of both position tables."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    layer_norm_eps: float
    patches_per_side: int

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"vit_config.json: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_heads}"
            )

    @classmethod
    def from_json(cls, vit: Mapping[str, Any], model: Mapping[str, Any], num_layers: int) -> VitConfig:
        """From ``vit_config.json``, ``config.json`` and the layers counted in the checkpoint."""
        try:
            return cls(
                hidden_size=int(vit["hidden_size"]),
                intermediate_size=int(vit["intermediate_size"]),
                num_layers=num_layers,
                num_heads=int(vit["num_attention_heads"]),
                patch_size=int(vit["patch_size"]),
                layer_norm_eps=float(vit.get("layer_norm_eps", 1e-6)),
                patches_per_side=int(model["vit_max_num_patch_per_side"]),
            )
        except KeyError as error:
            raise CheckpointError(f"vit_config.json or config.json has no field {error}") from error


@dataclass(frozen=True)
class ModelConfig:
    """All that the stages need to know of a checkpoint's shape."""

    language: LanguageConfig
    latent: LatentConfig
    vit: VitConfig
