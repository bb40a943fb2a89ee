"""How the stages of one server come to hold one copy of the weights, by the device they compute on."""

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
        """``sources``, which were read from ``files``, in ``dtype`` on the device, by name; not to be written to.

        Raises:
            MemoryError: there is no room for them.
            OSError: what is shared cannot be reached, as when it is another user's.
        """

    def close(self) -> None:
        """End what this process does for others; its own tensors stay."""


def shared_weights(prefix: str, device: torch.device) -> SharedWeights:
    """Those of the server with ``prefix`` on ``device``; nothing is opened before weights are asked for."""
    if device.type == "cpu":
        return WeightStore(prefix)
    from bagel_triton.ipc.cuda_memory import CudaMemory

    return DeviceWeights(prefix, CudaMemory(device))
