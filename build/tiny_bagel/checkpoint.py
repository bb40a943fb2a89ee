"""The small model's geometry, its first weights, and its files in the published layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import LanguageConfig, LatentConfig, ModelConfig, VitConfig
from bagel_triton.weights.checkpoint import stored_tensors
from bagel_triton.weights.folder import AUTOENCODER_FILE, INDEX_FILE, WEIGHTS_FILE
from bagel_triton.weights.tiny import tokenizer as tiny_tokenizer
from bagel_triton.weights.tiny.config import TinyConfig, json_files
from build.tiny_bagel.autoencoder import LATENT_CHANNELS
from build.tiny_bagel.data import VAE_SIDES, VIT_SIDES, corpus
from build.tiny_bagel.forward import LATENT_PATCH, TABLE_SIDE, VIT_PATCH, trained_cells

VOCABULARY = 784
VIT_SIDE = VIT_SIDES.longest // VIT_SIDES.stride
GEOMETRY = ModelConfig(
    LanguageConfig(
        hidden_size=160,
        intermediate_size=416,
        num_layers=5,
        num_heads=5,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=VOCABULARY,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
    ),
    LatentConfig(patch_size=LATENT_PATCH, channels=LATENT_CHANNELS, downsample=8, max_latent_size=TABLE_SIDE),
    VitConfig(
        hidden_size=96,
        intermediate_size=256,
        num_layers=2,
        num_heads=3,
        patch_size=VIT_PATCH,
        layer_norm_eps=1e-6,
        patches_per_side=VIT_SIDE,
    ),
)
EMBEDDING_STD = 0.4
TOKENIZER_FILES = ("merges.txt", "tokenizer_config.json", "vocab.json")


def new() -> Bagel:
    """An untrained model; torch's generator decides its weights."""
    model = Bagel(GEOMETRY)
    residual = (2 * GEOMETRY.language.num_layers) ** -0.5
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                gain = residual if name.endswith(("o_proj", "down_proj")) else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for name, value in model.named_parameters():
            if name.endswith("pos_embed"):
                nn.init.normal_(value, std=EMBEDDING_STD)
            elif value.ndim == 1 and "norm" in name and name.endswith("weight"):
                nn.init.ones_(value)
        nn.init.zeros_(model.llm2vae.weight)
        nn.init.normal_(model.language_model.lm_head.weight, std=0.02)
    return model


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer on the world's texts and write its files."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.write(folder, VOCABULARY, corpus(seed=0, count=4000))


def write(folder: Path, model: Bagel, autoencoder: Autoencoder, tokenizer: Path) -> None:
    """Write the whole checkpoint: the transformer in bfloat16, the autoencoder in float32.

    ``tokenizer`` is the folder of the one that the model was trained with. Positions of the flow
    that were not trained are those of the nearest one that was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    added = json.loads((tokenizer / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    token_ids = {token["content"]: int(index) for index, token in added.items()}
    for name, contents in _configs(token_ids).items():
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n")
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "latent_pos_embed.pos_embed":
            value = value[trained_cells(TABLE_SIDE, TABLE_SIDE)]
        stored = stored_tensors(name, tuple(value.shape), GEOMETRY.language)
        parts = value.split([shape[0] for shape in stored.values()])
        tensors |= {part: rows.to(torch.bfloat16).clone() for part, rows in zip(stored, parts, strict=True)}
    _save(tensors, folder / WEIGHTS_FILE)
    _save({name: value.contiguous() for name, value in autoencoder.state_dict().items()}, folder / AUTOENCODER_FILE)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS_FILE),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _configs(token_ids: dict[str, int]) -> dict[str, dict[str, object]]:
    """Contents of the configuration files, from those of a random tiny checkpoint."""
    language, vit = GEOMETRY.language, GEOMETRY.vit
    files = json_files(
        TinyConfig(
            hidden_size=language.hidden_size,
            layers=language.num_layers,
            heads=language.num_heads,
            kv_heads=language.num_kv_heads,
            intermediate_size=language.intermediate_size,
            vocab_size=language.vocab_size,
            max_latent_size=TABLE_SIDE,
        ),
        token_ids,
    )
    seen: dict[str, object] = {
        "hidden_size": vit.hidden_size,
        "intermediate_size": vit.intermediate_size,
        "num_attention_heads": vit.num_heads,
        "num_hidden_layers": vit.num_layers + 1,
        "image_size": VIT_SIDES.longest,
    }
    spoken: dict[str, object] = {"rope_theta": language.rope_theta}
    sides = {
        "vae_image_transform": {"max_image_size": VAE_SIDES.longest, "min_image_size": VAE_SIDES.shortest},
        "vit_image_transform": {"max_image_size": VIT_SIDES.longest, "min_image_size": VIT_SIDES.shortest},
    }
    files["vit_config.json"] |= seen
    files["llm_config.json"] |= spoken
    files["config.json"] |= {"vit_max_num_patch_per_side": VIT_SIDE, **sides}
    files["config.json"]["vit_config"] = files["vit_config.json"]
    files["config.json"]["llm_config"] |= spoken  # type: ignore[operator]
    # The random checkpoint's file is as published; this model is meant to be read greedily.
    files["generation_config.json"] = {
        name: value for name, value in files["generation_config.json"].items() if name.endswith("token_id")
    }
    return files
