"""A step's integers for the GPU, in one copy from pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = Sequence[int] | Tensor | NDArray[np.int64]  # on the CPU, int64
MIN_NUMBERS = 1 << 12


class Upload:
    """Sends whole numbers to ``device``: one copy a call, which the host does not wait for.

    Two buffers take turns, so a call waits at most for the copy of the last but one. On a CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._turn = device, 0
        self._buffers: list[tuple[Tensor, torch.cuda.Event | None]] = [(torch.empty(0, dtype=torch.int64), None)] * 2

    def __call__(self, longs: Sequence[Numbers], ints: Sequence[Numbers]) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors on the device: int64 of ``longs`` and int32 of ``ints``."""
        sizes = [len(part) for part in (*longs, *ints)]
        whole = self._send([*longs, *ints], sum(sizes))
        middle = sum(sizes[: len(longs)])
        narrow = whole[middle:].to(torch.int32) if ints else whole[:0]
        return list(whole[:middle].split(sizes[: len(longs)])), list(narrow.split(sizes[len(longs) :]))

    def _send(self, parts: Sequence[Numbers], total: int) -> Tensor:
        numbers = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
        if self._device.type == "cpu":
            return torch.from_numpy(numbers)
        return self._copy(numbers, torch.empty(total, dtype=torch.int64, device=self._device))

    def into(self, out: Tensor, numbers: Numbers) -> None:
        """Overwrite ``out`` [numbers] int64 on the device."""
        whole = np.asarray(numbers, dtype=np.int64)
        if self._device.type == "cpu":
            out.copy_(torch.from_numpy(whole))
        else:
            self._copy(whole, out)

    def _copy(self, numbers: NDArray[np.int64], out: Tensor) -> Tensor:
        self._turn = 1 - self._turn
        buffer, copied = self._buffers[self._turn]
        if copied is not None and not copied.query():
            copied.synchronize()
        total = len(numbers)
        if len(buffer) < total:
            buffer = torch.empty(max(2 * total, MIN_NUMBERS), dtype=torch.int64, pin_memory=True)
        buffer[:total].numpy()[:] = numbers
        out.copy_(buffer[:total], non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._buffers[self._turn] = buffer, event
        return out
