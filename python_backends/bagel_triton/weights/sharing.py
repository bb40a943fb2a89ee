"""Weights that the stages of one server share, by the device they compute on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from bagel_triton.weights.device import DeviceWeights
from bagel_triton.weights.files import FileIdentity
from bagel_triton.weights.layout import Source
from bagel_triton.weights.shm import WeightStore


class SharedWeights(Protocol):
    """Weights that the processes of a server share on one device."""

    @property
    def device(self) -> torch.device: ...

    def converted(
        self, sources: Mapping[str, Source], dtype: torch.dtype, files: tuple[FileIdentity, ...]
    ) -> dict[str, Tensor]:
        """``sources`` in ``dtype`` on the device, by name; nothing may write to them.

        ``files`` are those that the sources are mapped from.

        Raises:
            MemoryError: there is no room for them.
            OSError: the shared weights cannot be opened, for example another user's.
        """

    def close(self) -> None:
        """Stop sharing with processes that start later; tensors of this process stay."""


def shared_weights(prefix: str, device: torch.device) -> SharedWeights:
    """The weights of the server with ``prefix`` on ``device``; nothing is opened until weights are loaded."""
    if device.type == "cpu":
        return WeightStore(prefix)
    from bagel_triton.ipc.cuda_memory import CudaMemory

    return DeviceWeights(prefix, CudaMemory(device))
