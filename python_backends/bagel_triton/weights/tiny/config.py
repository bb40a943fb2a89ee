"""The shape of a tiny checkpoint, and its configuration files."""

from __future__ import annotations

from dataclasses import dataclass, field

from bagel_triton.deploy.config import ConfigError

BYTE_TOKENS = 256
# In the order and with the ids' order of Qwen2.5's tokenizer; the first 14 are "special", the rest plain added tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
# The published embedding has more rows than the tokenizer has tokens; the tiny one keeps that property.
SPARE_ROWS = 10
MIN_VOCAB_SIZE = BYTE_TOKENS + len(SPECIAL_TOKENS) + len(ADDED_TOKENS) + SPARE_ROWS
MAX_SEED = 2**63 - 1

CONFIG_FILES = ("config.json", "llm_config.json", "vit_config.json", "generation_config.json")
NORM_GROUPS = 32
Z_CHANNELS = 16
LATENT_PATCH = 2
VIT_HIDDEN_SIZE = 32
VIT_INTERMEDIATE_SIZE = 64
VIT_LAYERS_DECLARED = 3
"""``num_hidden_layers`` of the file; the weights hold one layer fewer, as the published ones do."""
VIT_HEADS = 2
VIT_PATCH = 14
VIT_SIDE_PATCHES = 70


@dataclass(frozen=True)
class TinyConfig:
    """Widths of a tiny checkpoint; each field's ``help`` says what it is.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """

    hidden_size: int = field(default=64, metadata={"help": "width of the transformer"})
    layers: int = field(default=2, metadata={"help": "transformer layers"})
    heads: int = field(default=4, metadata={"help": "attention heads; they divide the hidden size"})
    kv_heads: int = field(default=2, metadata={"help": "key/value heads; they divide the heads"})
    intermediate_size: int = field(default=128, metadata={"help": "width of each expert's MLP"})
    vocab_size: int = field(default=512, metadata={"help": "rows of the embedding and of lm_head"})
    vae_channels: int = field(default=32, metadata={"help": "narrowest width of the autoencoder"})
    max_latent_size: int = field(default=64, metadata={"help": "latent positions per side, 16 pixels each"})
    stale_max_latent_size: int | None = field(
        default=None, metadata={"help": "max_latent_size that config.json states, where it shall be wrong"}
    )
    shards: int = field(default=1, metadata={"help": "files that the transformer's weights are split into"})
    seed: int = field(default=0, metadata={"help": "seed of the random weights"})

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "intermediate_size", "max_latent_size", "shards"):
            self._require(name, getattr(self, name) >= 1, "an integer >= 1")
        if self.stale_max_latent_size is not None:
            self._require("stale_max_latent_size", self.stale_max_latent_size >= 1, "an integer >= 1")
        self._require("kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads={self.heads}")
        # Rotary embedding rotates pairs of a head; the position tables use a quarter of the width per sine and cosine.
        self._require(
            "hidden_size",
            self.hidden_size >= 1 and self.hidden_size % (2 * self.heads) == 0 and self.hidden_size % 4 == 0,
            f"a multiple of 4 and of 2 * heads = {2 * self.heads} (the head size is even)",
        )
        self._require("vocab_size", self.vocab_size >= MIN_VOCAB_SIZE, f"an integer >= {MIN_VOCAB_SIZE}")
        self._require(
            "vae_channels",
            self.vae_channels >= 1 and self.vae_channels % NORM_GROUPS == 0,
            f"a multiple of {NORM_GROUPS}, the groups of its GroupNorm",
        )
        self._require("seed", 0 <= self.seed <= MAX_SEED, f"an integer from 0 to {MAX_SEED}")

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed; allowed: {allowed}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def vae_widths(self) -> tuple[int, ...]:
        """Widths of the autoencoder's levels, full resolution first."""
        return tuple(self.vae_channels * factor for factor in (1, 1, 2, 2))


def json_files(config: TinyConfig, token_ids: dict[str, int]) -> dict[str, dict[str, object]]:
    """Contents of the checkpoint's configuration files by file name.

    Args:
        token_ids: ids of the tokenizer's special tokens.
    """
    # As published: "bos" is the end of a document, which no prompt of BAGEL starts with.
    bos, eos = token_ids["<|endoftext|>"], token_ids["<|im_end|>"]
    llm: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": config.layers,
        "model_type": "qwen2",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    vit: dict[str, object] = {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": VIT_HIDDEN_SIZE,
        "image_size": VIT_SIDE_PATCHES * VIT_PATCH,
        "intermediate_size": VIT_INTERMEDIATE_SIZE,
        "layer_norm_eps": 1e-6,
        "model_type": "siglip_vision_model",
        "num_attention_heads": VIT_HEADS,
        "num_channels": 3,
        "num_hidden_layers": VIT_LAYERS_DECLARED,
        "patch_size": VIT_PATCH,
    }
    bagel: dict[str, object] = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "visual_gen": True,
        "visual_und": True,
        "latent_patch_size": LATENT_PATCH,
        "max_latent_size": config.stale_max_latent_size or config.max_latent_size,
        "vit_max_num_patch_per_side": VIT_SIDE_PATCHES,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        "timestep_shift": 1.0,
        "llm_config": llm | {"qk_norm": True, "layer_module": "Qwen2MoTDecoderLayer"},
        "vit_config": vit,
        "vae_config": {"z_channels": Z_CHANNELS, "downsample": 8},
    }
    generation: dict[str, object] = {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": [eos, bos],
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    return dict(zip(CONFIG_FILES, (bagel, llm, vit, generation), strict=True))
