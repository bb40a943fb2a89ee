"""Adapters of the tiny checkpoint's layers, random and strong enough to be seen."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "self_attn.q_proj{}": (96, 96),
    "self_attn.k_proj{}": (32, 96),
    "self_attn.v_proj{}": (32, 96),
    "self_attn.o_proj{}": (96, 96),
    "mlp{}.gate_proj": (160, 96),
    "mlp{}.up_proj": (160, 96),
    "mlp{}.down_proj": (96, 160),
}


def write_layers(folder: Path, seed: int, rank: int, projections: tuple[str, ...] = tuple(SHAPES)) -> str:
    """An adapter of ``projections`` of both experts in every layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(3):
        for projection in projections:
            for suffix in ("", "_moe_gen"):
                rows, inner = SHAPES[projection]
                name = f"base_model.model.language_model.model.layers.{layer}.{projection.format(suffix)}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inner, generator=generator) / inner**0.5
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / inner**0.5
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)
