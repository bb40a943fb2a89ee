"""A checkpoint's networks, their weights memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from bagel_triton.model.autoencoder import Autoencoder
from bagel_triton.model.bagel import Bagel
from bagel_triton.model.config import CheckpointError, ModelConfig
from bagel_triton.weights.device import on_device
from bagel_triton.weights.files import CheckpointFiles, TensorFiles
from bagel_triton.weights.sharing import SharedWeights

Module = TypeVar("Module", bound=nn.Module)


class Checkpoint:
    """A checkpoint folder whose files, names and shapes were checked on opening.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """

    def __init__(self, directory: str | Path) -> None:
        files = CheckpointFiles(directory)
        self.directory, self.config = files.directory, files.config
        self._weights, self._autoencoder = files.weights, files.autoencoder
        with torch.device("meta"):
            _check_shapes(Bagel(self.config), self._weights.shapes())
            autoencoder = Autoencoder(self._autoencoder.shapes())
            _check_shapes(autoencoder, self._autoencoder.shapes())
        latent = self.config.latent
        if (autoencoder.latent_channels, autoencoder.downsample) != (latent.channels, latent.downsample):
            raise CheckpointError(
                f"config.json says z_channels={latent.channels}, downsample={latent.downsample}; the autoencoder's "
                f"tensors have {autoencoder.latent_channels} channels and downsample by {autoencoder.downsample}"
            )

    def load_bagel(self, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None = None) -> Bagel:
        """The transformer with its flow head, on ``device`` in ``dtype``; its weights are in ``shared``, if given.

        Raises:
            MemoryError: there is no room for them.
            ValueError: ``shared`` is on another device.
        """
        with torch.device("meta"):
            module = Bagel(self.config)
        return _fill(module, self._weights, device, dtype, shared)

    def load_autoencoder(
        self, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None = None
    ) -> Autoencoder:
        """The autoencoder, likewise."""
        with torch.device("meta"):
            module = Autoencoder(self._autoencoder.shapes())
        return _fill(module, self._autoencoder, device, dtype, shared)


def inspect(directory: str | Path) -> ModelConfig:
    """Check the checkpoint in ``directory`` and return its geometry; reads headers only.

    Raises:
        CheckpointError: names the file, field or tensor that is wrong.
    """
    return Checkpoint(directory).config


def _check_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in module.state_dict().items():
        if name not in shapes:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        if shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(shapes[name])}; the configuration files say {list(tensor.shape)}"
            )


def _fill(
    module: Module, files: TensorFiles, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None
) -> Module:
    if shared is not None and shared.device != device:
        raise ValueError(f"device={device}: the shared weights are on {shared.device}")
    state = {name: files.tensor(name) for name in module.state_dict()}  # mapped, and not read yet
    state = on_device(state, device, dtype) if shared is None else shared.converted(state, dtype, files.identity)
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()
