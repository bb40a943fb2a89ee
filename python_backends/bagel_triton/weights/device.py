"""One copy of the weights on a device, mapped by all processes of a server that compute there.

Nothing writes to weights once they are loaded: modules are made with ``requires_grad_(False)``
and no engine changes a parameter. On a CPU a read-only mapping sees to it; a device's memory
may have no such thing, see :mod:`~bagel_triton.ipc.cuda_memory`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from bagel_triton.ipc.cuda_memory import NotShareable
from bagel_triton.ipc.shared_descriptor import SharedDescriptor
from bagel_triton.weights.files import FileIdentity
from bagel_triton.weights.layout import Layout, Source, read_into, shape_of

log = logging.getLogger(__name__)


class DeviceMemory(Protocol):
    """Memory of one device that is there as long as any process has a descriptor or a mapping of it.

    A mapping lasts as long as any tensor of it. Every call may raise :class:`NotShareable`.
    """

    @property
    def alignment(self) -> int:
        """Bytes, at which the device's kernels want a tensor to begin."""

    @property
    def device(self) -> torch.device: ...

    @property
    def name(self) -> str:
        """What names the device alike in every process."""

    def allocate(self, size: int) -> tuple[int, Tensor]:
        """A descriptor of new memory, and its bytes mapped for writing: uint8 [size].

        Raises:
            MemoryError: the device has no room.
        """

    def open(self, descriptor: int, size: int) -> Tensor:
        """The bytes behind ``descriptor``, mapped for reading: uint8 [size]."""

    def complete(self) -> None:
        """Return when all that was copied to the device is there."""


class DeviceWeights:
    """The weights of one server's stages on a device, under names ``PREFIX_UID_weights_KEY``.

    Contents: the key stands for the checkpoint's files, the tensors, the dtype and the device.

    Processes: the first that asks loads, the others map the same memory:
    :class:`~bagel_triton.ipc.shared_descriptor.SharedDescriptor` has the rules. They go on where
    it dies, and any of them gives the memory to a stage that is started again.

    Where the memory cannot be shared, this process loads a copy of its own, and logs why.

    Lifetime: tensors outlive :meth:`close`; the memory ends with its last tensor and holder.
    Threads: one at a time.

    Raises:
        MemoryError: the device has no room for the weights.
        PermissionError, OSError: as for ``SharedDescriptor``.
    """

    def __init__(self, prefix: str, memory: DeviceMemory) -> None:
        self._prefix, self._memory = prefix, memory
        self._held: dict[str, SharedDescriptor] = {}

    @property
    def device(self) -> torch.device:
        return self._memory.device

    def converted(
        self, sources: Mapping[str, Source], dtype: torch.dtype, files: tuple[FileIdentity, ...]
    ) -> dict[str, Tensor]:
        """``sources`` in ``dtype``, by name, on the device.

        ``files`` are those that the sources were read from; sources are read only if no
        living process of the server has them on the device.
        """
        layout = Layout.of(sources, dtype, self._memory.alignment)
        try:
            return layout.views(self._contents(layout, sources, files))
        except NotShareable as error:
            log.warning("the weights on %s are a copy of this process's own: %s", self.device, error)
        return on_device(sources, self.device, dtype)

    def close(self) -> None:
        """Give the weights to nobody any more, as a stage does that ends in good order."""
        while self._held:
            self._held.popitem()[1].close()

    def _contents(self, layout: Layout, sources: Mapping[str, Source], files: tuple[FileIdentity, ...]) -> Tensor:
        # Users have names of their own: all of them see all names, and share nothing.
        name = f"{self._prefix}_{os.geteuid()}_weights_{layout.key(files, self._memory.name)}"
        started = time.perf_counter()
        if name not in self._held:
            self._held[name] = SharedDescriptor(name, lambda: self._load(layout, sources))
        held = self._held[name]
        try:
            contents = self._memory.open(held.descriptor, layout.size)
        except NotShareable:
            self._held.pop(name).close()
            raise
        how = "loaded for all processes" if held.made_here else "mapped, another process has loaded them"
        took = time.perf_counter() - started
        log.info("%d bytes of weights on %s: %s, in %.1f s: %s", layout.size, self.device, how, took, name)
        return contents

    def _load(self, layout: Layout, sources: Mapping[str, Source]) -> int:
        """A descriptor of the weights, which are on the device by the time it is returned."""
        descriptor, contents = self._memory.allocate(layout.size)
        try:
            layout.fill(contents, sources)
            self._memory.complete()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def on_device(sources: Mapping[str, Source], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """``sources`` on ``device`` in ``dtype``, by name; a source that is there already is not copied."""

    def placed(source: Source) -> Tensor:
        if isinstance(source, Tensor):
            return source.to(device=device, dtype=dtype)
        target = torch.empty(shape_of(source), device=device, dtype=dtype)
        read_into(target, source)
        return target

    return {name: placed(source) for name, source in sources.items()}
