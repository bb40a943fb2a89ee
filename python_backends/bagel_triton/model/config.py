"""The geometry of a checkpoint, read from its configuration files and tensor shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bagel_triton.model.image import VAE_RULE, VIT_RULE, ResizeRule
from bagel_triton.protocol.messages import LATENT_STRIDE, Segment, TextSegment, VaeSegment

MAX_MESSAGE = 1000  # characters
MAX_SIZE = 1 << 20  # of a layer or a vocabulary, several times what any published model has


class CheckpointError(ValueError):
    """The checkpoint is missing a file or tensor, or one does not fit the others.

    The message is one line of bounded length, for any names and values in the files.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}...")


class Fields:
    """The fields of a configuration file, with checks of their types.

    Raises:
        CheckpointError: the message has the file, the field, its value and what is allowed.
    """

    def __init__(self, file: str, fields: Mapping[str, Any]) -> None:
        self.file, self._fields = file, fields

    def has(self, name: str) -> bool:
        """Whether the file has the field, and not as null."""
        return self._fields.get(name) is not None

    def plain(self, name: str) -> Any:
        """The field as it is in the file."""
        return self._fields.get(name)

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._error(name, value, "a number above 0")
        return value

    def integer(self, name: str) -> int:
        """An integer from 1 to :data:`MAX_SIZE`."""
        value = self.number(name)
        if value != int(value) or value > MAX_SIZE:
            raise self._error(name, value, f"an integer from 1 to {MAX_SIZE}")
        return int(value)

    def only(self, name: str, served: object) -> None:
        """Refuse any value but ``served`` of an optional field."""
        if self.has(name) and self._fields[name] != served:
            raise self._error(name, self._fields[name], repr(served))

    def section(self, name: str) -> Fields:
        """An object inside this one."""
        value = self._fields.get(name)
        if not isinstance(value, dict):
            raise self._error(name, value, "an object")
        return Fields(f"{self.file}: {name}", value)

    def _error(self, name: str, value: object, allowed: str) -> CheckpointError:
        if name not in self._fields:
            return CheckpointError(f"{self.file} has no field {name}")
        return CheckpointError(f"{self.file}: {name}={value!r} is not allowed; allowed: {allowed}")


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
                f"llm_config.json: num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"llm_config.json: hidden_size={self.hidden_size} of num_attention_heads={self.num_heads} has "
                f"head_dim={self.head_dim}; rotary embedding needs an even one"
            )

    @classmethod
    def read(cls, fields: Fields) -> LanguageConfig:
        """From ``llm_config.json``."""
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        for name, served in (("hidden_act", "silu"), ("rope_scaling", None), ("use_sliding_window", False)):
            fields.only(name, served)
        return cls(
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=fields.integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim") if fields.has("head_dim") else hidden // heads,
            vocab_size=fields.integer("vocab_size"),
            rope_theta=fields.number("rope_theta"),
            rms_norm_eps=fields.number("rms_norm_eps"),
        )


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
    longest: int | None = None

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
        """Longest image side in pixels that the position table covers, at most ``longest``."""
        covered = self.max_latent_size * self.stride
        return covered if self.longest is None else min(covered, self.longest)

    @classmethod
    def read(cls, fields: Fields, position_rows: int) -> LatentConfig:
        """From ``config.json`` and the rows of ``latent_pos_embed.pos_embed``."""
        side = round(position_rows**0.5)
        if side * side != position_rows:
            raise CheckpointError(f"latent_pos_embed.pos_embed has {position_rows} rows, which is no square")
        vae = fields.section("vae_config")
        config = cls(fields.integer("latent_patch_size"), vae.integer("z_channels"), vae.integer("downsample"), side)
        if config.stride != LATENT_STRIDE:
            raise CheckpointError(
                f"config.json: latent_patch_size={config.patch_size} and downsample={config.downsample} make a latent "
                f"token cover {config.stride} pixels a side; only {LATENT_STRIDE} is supported"
            )
        return config


@dataclass(frozen=True)
class VitConfig:
    """The SigLIP encoder.

    ``num_layers`` counts the checkpoint's layers, one fewer than in ``vit_config.json``.
    ``patches_per_side`` is the side of both position tables.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    layer_norm_eps: float
    patches_per_side: int

    @property
    def max_side(self) -> int:
        """Longest side in pixels that the position table covers."""
        return self.patches_per_side * self.patch_size

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"vit_config.json: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_heads}"
            )

    @classmethod
    def read(cls, vit: Fields, model: Fields, num_layers: int) -> VitConfig:
        """From ``vit_config.json``, ``config.json`` and the layers counted in the checkpoint."""
        vit.only("hidden_act", "gelu_pytorch_tanh")
        vit.only("num_hidden_layers", num_layers + 1)
        for name, served in (("connector_act", "gelu_pytorch_tanh"), ("interpolate_pos", False), ("visual_gen", True)):
            model.only(name, served)
        return cls(
            hidden_size=vit.integer("hidden_size"),
            intermediate_size=vit.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=vit.integer("num_attention_heads"),
            patch_size=vit.integer("patch_size"),
            layer_norm_eps=vit.number("layer_norm_eps", default=1e-6),
            patches_per_side=model.integer("vit_max_num_patch_per_side"),
        )


def read_resize_rule(fields: Fields, name: str, published: ResizeRule) -> ResizeRule:
    """The bounds of an image's sides, from an optional section ``name`` of ``config.json``.

    The published file has none: its model was trained with the ``published`` bounds.
    """
    if not fields.has(name):
        return published
    section = fields.section(name)
    rule = ResizeRule(published.stride, section.integer("max_image_size"), section.integer("min_image_size"))
    if not published.stride <= rule.shortest <= rule.longest:
        raise CheckpointError(
            f"{section.file}: min_image_size={rule.shortest} is not allowed; allowed: an integer from "
            f"{published.stride} to max_image_size={rule.longest}"
        )
    return rule


@dataclass(frozen=True)
class ModelConfig:
    """The geometry of a checkpoint without its autoencoder.

    ``vae_resize`` and ``vit_resize`` bound the sides of images that come in.
    """

    language: LanguageConfig
    latent: LatentConfig
    vit: VitConfig
    vae_resize: ResizeRule = VAE_RULE
    vit_resize: ResizeRule = VIT_RULE

    @property
    def drawn_side(self) -> int:
        """Longest side in pixels of the images that training drew; the position table may go on beyond it."""
        return min(self.latent.max_side, self.vae_resize.longest)

    def limited(self, pixels: int) -> ModelConfig:
        """The same for images of at most so many ``pixels``, were they squares: drawn ones, and those that are edited.

        Images that come in are scaled down to that, as the usual size of an edit is that of its image.
        """
        side = math.isqrt(pixels) // self.latent.stride * self.latent.stride
        rule = self.vae_resize
        resize = replace(rule, longest=min(rule.longest, side), shortest=min(rule.shortest, side))
        return replace(self, latent=replace(self.latent, longest=side), vae_resize=resize)


VISION_TOKENS = 2  # <|vision_start|> and <|vision_end|> around an image's tokens


def segment_tokens(segment: Segment, config: ModelConfig) -> int:
    """Tokens that ``segment`` adds to a context."""
    if isinstance(segment, TextSegment):
        return len(segment.token_ids)
    stride = config.latent.stride if isinstance(segment, VaeSegment) else config.vit.patch_size
    return (segment.height // stride) * (segment.width // stride) + VISION_TOKENS
