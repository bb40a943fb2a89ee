"""LoRA adapters that requests choose: their tensors by layer, expert and projection."""

from __future__ import annotations

import hashlib
import math
from itertools import product
from pathlib import Path

import torch

from bagel_triton.model.config import CheckpointError, LanguageConfig
from bagel_triton.model.lora import LoraAdapter, LowRank, Projection
from bagel_triton.model.quantization import QUANTIZED
from bagel_triton.weights.checkpoint import EXPERT_SUFFIX, EXPERT_TENSORS
from bagel_triton.weights.files import TensorFiles
from bagel_triton.weights.lora import CONFIG_FILE, TENSORS_FILE, Adapter

USUAL_RANK = 16  # of adapters that memory is kept for, where no other is given; vLLM's default
Place = tuple[int, bool, Projection]  # a layer, whether it is the generation expert's, and a projection


def load_adapter(
    name: str,
    directory: str | Path,
    config: LanguageConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_rank: int | None = None,
) -> LoraAdapter:
    """The adapter in the folder ``directory`` as ``name``, its tensors on ``device`` in ``dtype``.

    One of a rank above ``max_rank`` is refused.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong, or a module that only merged adapters change.
    """
    adapter, places = Adapter(directory), _places(config)
    outside = [tensor for tensor in adapter.updates if tensor not in places]
    if outside:
        module = outside[0].removesuffix(".weight")
        allowed = f"{', '.join(sorted({place[2] for place, _ in places.values()}))} of the transformer's layers"
        raise CheckpointError(
            f"{adapter.directory} adapts {module}, which an adapter of requests cannot; allowed: {allowed} "
            "(--lora-path merges an adapter of other modules into the weights)"
        )
    adapter.check({tensor: shape for tensor, (_, shape) in places.items()})
    rank = max(len(down) for down, _ in adapter.updates.values())
    if max_rank is not None and rank > max_rank:
        raise CheckpointError(f"{adapter.directory} has rank {rank}; allowed: up to {max_rank} (max_lora_rank)")
    layers: list[dict[tuple[bool, Projection], LowRank]] = [{} for _ in range(config.num_layers)]
    for tensor, (down, up) in adapter.updates.items():
        layer, gen, projection = places[tensor][0]
        layers[layer][gen, projection] = LowRank(down.to(device, dtype), up.to(device, dtype))
    return LoraAdapter(name, layers)


def adapter_bytes(directory: str | Path, dtype: torch.dtype) -> int:
    """Bytes of the adapter in the folder ``directory`` in ``dtype``; reads its header alone.

    Raises:
        CheckpointError: it cannot be read.
    """
    shapes = TensorFiles([Path(directory) / TENSORS_FILE]).shapes()
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def files_state(directory: str | Path) -> str:
    """A digest of the files of the adapter in ``directory``; empty without them."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for name in (CONFIG_FILE, TENSORS_FILE):
            with (Path(directory) / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    except OSError:
        return ""
    return digest.hexdigest()


def largest_bytes(config: LanguageConfig, rank: int, dtype: torch.dtype) -> int:
    """Bytes of an adapter of ``rank`` that has every module it may have."""
    return sum(rank * sum(shape) for _, shape in _places(config).values()) * dtype.itemsize


def _places(config: LanguageConfig) -> dict[str, tuple[Place, tuple[int, int]]]:
    """The place and shape of every weight that a request's adapter may change, by its name in the checkpoint."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[Projection, tuple[int, int]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    modules = {module.format("").rpartition(".")[2]: module for key in QUANTIZED for module in EXPERT_TENSORS[key]}
    found: dict[str, tuple[Place, tuple[int, int]]] = {}
    for layer, (expert, suffix) in product(range(config.num_layers), EXPERT_SUFFIX.items()):
        for projection, shape in shapes.items():
            module = f"language_model.model.layers.{layer}.{modules[projection].format(suffix)}"
            found[f"{module}.weight"] = (layer, expert == "gen", projection), shape
    return found
