"""A checkpoint's networks, their weights memory-mapped.

Parameters have the names of the checkpoint's tensors, but for the transformer's layers: there a
parameter belongs to one expert and may hold several tensors, one above the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import CheckpointError, LanguageConfig, ModelConfig
from bagel_triton.model.cpu.row_stable import make_row_stable
from bagel_triton.weights import validation
from bagel_triton.weights.files import CheckpointFiles, TensorFiles
from bagel_triton.weights.layout import Source
from bagel_triton.weights.sharing import SharedWeights, on_device

Module = TypeVar("Module", bound=nn.Module)
EXPERT_PARAMETER = re.compile(r"(language_model\.model\.layers\.\d+)\.(gen|und)\.(.+)\.(weight|bias)")
EXPERT_SUFFIX = {"gen": "_moe_gen", "und": ""}
EXPERT_TENSORS: Mapping[str, Sequence[str]] = {
    "input_layernorm": ["input_layernorm{}"],
    "qkv_proj": ["self_attn.q_proj{}", "self_attn.k_proj{}", "self_attn.v_proj{}"],
    "q_norm": ["self_attn.q_norm{}"],
    "k_norm": ["self_attn.k_norm{}"],
    "o_proj": ["self_attn.o_proj{}"],
    "post_attention_layernorm": ["post_attention_layernorm{}"],
    "mlp.gate_up_proj": ["mlp{}.gate_proj", "mlp{}.up_proj"],
    "mlp.down_proj": ["mlp{}.down_proj"],
}
# Outside its layers the transformer is computed by plain modules on every device.
ROW_STABLE = (
    "time_embedder",
    "vae2llm",
    "llm2vae",
    "language_model.lm_head",
    "language_model.model.norm",
    "language_model.model.norm_moe_gen",
)
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class Checkpoint:
    """A checkpoint folder whose files, names and shapes were checked on opening.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """

    def __init__(self, directory: str | Path) -> None:
        files = CheckpointFiles(directory)
        self.directory, self.config = files.directory, files.config
        self._weights, self._autoencoder = files.weights, files.autoencoder
        try:
            with torch.device("meta"):
                bagel, autoencoder = Bagel(self.config), Autoencoder(self._autoencoder.shapes())
        except RuntimeError as error:  # an overflow of a tensor's size
            raise CheckpointError(f"{self.directory}: the sizes in its configuration files are too large") from error
        for module, tensors in ((bagel, self._weights), (autoencoder, self._autoencoder)):
            expected: dict[str, tuple[int, ...]] = {}
            for name, tensor in module.state_dict().items():
                expected |= stored_tensors(name, tuple(tensor.shape), self.config.language)
            validation.check_tensors(tensors, expected)
        latent = self.config.latent
        if (autoencoder.latent_channels, autoencoder.downsample) != (latent.channels, latent.downsample):
            raise CheckpointError(
                f"config.json says z_channels={latent.channels}, downsample={latent.downsample}; the autoencoder's "
                f"tensors have {autoencoder.latent_channels} channels and downsample by {autoencoder.downsample}"
            )

    def load_bagel(self, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None = None) -> Bagel:
        """The transformer with its flow head, on ``device`` in ``dtype``; its weights are in ``shared``, if given.

        Raises:
            CheckpointError: a tensor has values that are NaN or infinite.
            MemoryError: there is no room for them.
            ValueError: ``shared`` is on another device.
        """
        with torch.device("meta"):
            module = Bagel(self.config)
            if device.type == "cpu":
                make_row_stable(module, *ROW_STABLE)
        return self._fill(module, self._weights, device, dtype, shared)

    def load_autoencoder(
        self, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None = None
    ) -> Autoencoder:
        """The autoencoder, likewise."""
        with torch.device("meta"):
            module = Autoencoder(self._autoencoder.shapes())
        return self._fill(module, self._autoencoder, device, dtype, shared)

    def stored_apart(self, dtype: torch.dtype) -> int:
        """Bytes of all weights that processes on a CPU cannot map from the checkpoint's files.

        The transformer computes in ``dtype``. Weights stored in another dtype are converted, and
        tensors that do not adjoin in their file are copied into their packed parameter.
        """
        with torch.device("meta"):
            bagel, autoencoder = Bagel(self.config).to(dtype), Autoencoder(self._autoencoder.shapes())
        size = 0
        for module, files in ((bagel, self._weights), (autoencoder, self._autoencoder)):
            for name, tensor in module.state_dict().items():
                names = [*stored_tensors(name, tuple(tensor.shape), self.config.language)]
                if not files.adjoin(names) or files.dtypes(names) != {SAFETENSORS_DTYPES[tensor.dtype]}:
                    size += tensor.nbytes
        return size

    def _fill(
        self,
        module: Module,
        files: TensorFiles,
        device: torch.device,
        dtype: torch.dtype,
        shared: SharedWeights | None,
    ) -> Module:
        if shared is not None and shared.device != device:
            raise ValueError(f"device={device}: the shared weights are on {shared.device}")

        def source(names: Sequence[str]) -> Source:  # mapped, and not read yet
            if len(names) == 1:
                return files.tensor(names[0])
            return files.stacked(names) if files.adjoin(names) else tuple(files.tensor(name) for name in names)

        sources = {
            name: source([*stored_tensors(name, tuple(tensor.shape), self.config.language)])
            for name, tensor in module.state_dict().items()
        }
        try:
            state = (
                on_device(sources, device, dtype)
                if shared is None
                else shared.converted(sources, dtype, files.identity)
            )
        except validation.NotFinite as error:
            shape = tuple(module.state_dict()[error.parameter].shape)
            names = stored_tensors(error.parameter, shape, self.config.language)
            raise _not_finite(files, names) from error
        module.load_state_dict(state, assign=True)
        return module.requires_grad_(False).eval()


def inspect(directory: str | Path) -> ModelConfig:
    """Check the checkpoint in ``directory`` and return its geometry; reads headers only.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """
    return Checkpoint(directory).config


def stored_tensors(parameter: str, shape: tuple[int, ...], config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors that a parameter of ``shape`` holds, one above the other."""
    found = EXPERT_PARAMETER.fullmatch(parameter)
    if found is None:
        return {parameter: shape}
    layer, expert, module, kind = found.groups()
    names = [f"{layer}.{name.format(EXPERT_SUFFIX[expert])}.{kind}" for name in EXPERT_TENSORS[module]]
    rows = [shape[0] // len(names)] * len(names)
    if module == "qkv_proj":
        rows = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    return {name: (count, *shape[1:]) for name, count in zip(names, rows, strict=True)}


def _not_finite(files: TensorFiles, names: Iterable[str]) -> CheckpointError:
    name = next(name for name in names if not validation.is_finite(files.tensor(name)))
    tensor = files.tensor(name)
    found = validation.not_finite_at(tensor)
    return CheckpointError(
        f"{files.file(name)}: tensor {name} has NaN or infinite values ({len(found)} of {tensor.numel()}, "
        f"the first at {list(found[0])}); download the file again, or use another checkpoint"
    )
