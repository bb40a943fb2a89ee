"""A stage's process as far as its weights go: a thing for :func:`tests.support.kv_process.peer` to own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bagel_triton.model.bagel import Bagel
from bagel_triton.weights.checkpoint import Checkpoint
from bagel_triton.weights.files import FileIdentity
from bagel_triton.weights.layout import Source
from bagel_triton.weights.sharing import SharedWeights


class Counted(dict[str, Source]):
    """Sources that count how often one is read."""

    reads = 0

    def __getitem__(self, name: str) -> Source:
        self.reads += 1
        return super().__getitem__(name)


class CountedWeights:
    """Shared weights that count the sources they read."""

    def __init__(self, weights: SharedWeights) -> None:
        self._weights, self.reads = weights, 0

    @property
    def device(self) -> torch.device:
        return self._weights.device

    def converted(
        self, sources: Mapping[str, Source], dtype: torch.dtype, files: tuple[FileIdentity, ...]
    ) -> dict[str, Tensor]:
        counted = Counted(sources)
        try:
            return self._weights.converted(counted, dtype, files)
        finally:
            self.reads += counted.reads

    def close(self) -> None:
        self._weights.close()

    def free(self) -> None:
        self._weights.free()


class WeightHolder:
    """The transformer of ``checkpoint``, in the weights that ``make`` makes."""

    def __init__(self, make: Callable[[], SharedWeights], checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        self._checkpoint, self._dtype = Checkpoint(checkpoint), dtype
        self._weights = CountedWeights(make())
        self._loaded: list[Bagel] = []

    def load(self) -> int | str:
        """How many of the checkpoint's tensors had to be read, or the error."""
        before = self._weights.reads
        try:
            bagel = self._checkpoint.load_bagel(self._weights.device, self._dtype, self._weights)
        except (MemoryError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        self._loaded.append(bagel)
        return self._weights.reads - before

    def differing(self) -> list[str]:
        """The loaded weights that are not what the checkpoint says."""
        private = self._checkpoint.load_bagel(torch.device("cpu"), self._dtype).state_dict()
        shared = self._loaded[-1].state_dict()
        return [name for name in private if not torch.equal(private[name], shared[name].cpu())]

    def files(self) -> set[str]:
        """The files that the loaded weights are mapped from, as device and inode."""
        return {mapped_file(tensor) for bagel in self._loaded for tensor in bagel.state_dict().values()}

    def norms(self, rounds: int) -> list[float]:
        """Computed from the first weight ``rounds`` times over, on the weights' device."""
        weight = next(iter(self._loaded[-1].parameters()))
        return [float(torch.linalg.vector_norm(weight.double())) for _ in range(rounds)]

    def used(self) -> int:
        """Bytes of the GPU's memory in use, by all processes."""
        free, total = torch.cuda.mem_get_info(self._weights.device)
        return total - free

    def unload(self) -> None:
        """Let go of all tensors, and go on giving."""
        self._loaded.clear()

    def close(self) -> None:
        self._weights.close()


def mapped_file(tensor: Tensor) -> str:
    """Device and inode of the file whose mapping ``tensor`` is in."""
    return " ".join(mapping(tensor.data_ptr())[3:5])


def mapping(address: int) -> list[str]:
    """The kernel's entry for the mapping that contains ``address``: range, access, offset, device, inode, path."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end:
            return fields
    raise AssertionError("not mapped")
