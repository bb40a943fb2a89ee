"""One copy of the weights on a GPU, mapped by all processes of a server that compute there.

Nothing writes to weights once they are loaded: parameters need no gradients, and no engine
changes one. On a CPU the mapping is read-only; a GPU may not support that, see
:mod:`~bagel_triton.ipc.cuda_memory`.
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
from bagel_triton.weights.layout import Layout, Source, check_finite, read_into, shape_of

log = logging.getLogger(__name__)


class DeviceMemory(Protocol):
    """Memory of one device that lasts as long as any process has a descriptor or a mapping of it.

    A mapping lasts as long as any tensor of it. Every call may raise :class:`NotShareable`.
    """

    @property
    def alignment(self) -> int:
        """Bytes at whose multiples the device's kernels expect a tensor to begin."""

    @property
    def device(self) -> torch.device: ...

    @property
    def name(self) -> str:
        """The device's name, the same in every process."""

    def allocate(self, size: int) -> tuple[int, Tensor]:
        """A descriptor of new memory, and its bytes mapped for writing: uint8 [size].

        Raises:
            MemoryError: the device has no room.
        """

    def open(self, descriptor: int, size: int) -> Tensor:
        """The memory of ``descriptor``, mapped for reading: uint8 [size]."""

    def complete(self) -> None:
        """Wait for copies to the device."""


class DeviceWeights:
    """The weights of one server's stages on a device, under names ``PREFIX_UID_weights_KEY``.

    Contents: the key is a digest of the checkpoint's files, the tensors, the dtype and the device.

    Processes: the first one loads, the others map the same memory by way of
    :class:`~bagel_triton.ipc.shared_descriptor.SharedDescriptor`. They keep it when the first
    dies, and each can hand it to a stage that starts again. Where memory cannot be shared, this
    process loads its own copy and logs why.

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

        Sources come from ``files`` and are read only if no living process of the server has them
        on the device.
        """
        layout = Layout.of(sources, dtype, self._memory.alignment)
        try:
            return layout.views(self._contents(layout, sources, files))
        except NotShareable as error:
            log.warning("this process has its own copy of the weights on %s: %s", self.device, error)
        return on_device(sources, self.device, dtype)

    def close(self) -> None:
        """Stop handing the weights to other processes."""
        while self._held:
            self._held.popitem()[1].close()

    def _contents(self, layout: Layout, sources: Mapping[str, Source], files: tuple[FileIdentity, ...]) -> Tensor:
        # With the user's id: all users see each other's names, and share nothing.
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
        how = "loaded for all processes" if held.made_here else "mapped from another process"
        took = time.perf_counter() - started
        log.info("%d bytes of weights on %s: %s, in %.1f s: %s", layout.size, self.device, how, took, name)
        return contents

    def _load(self, layout: Layout, sources: Mapping[str, Source]) -> int:
        """Copy the weights to the device; a descriptor of their memory."""
        descriptor, contents = self._memory.allocate(layout.size)
        try:
            layout.fill(contents, sources)
            self._memory.complete()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def on_device(sources: Mapping[str, Source], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """``sources`` on ``device`` in ``dtype``, by name; a source that is there already is not copied.

    Raises:
        NotFinite: one has values that are NaN or infinite.
    """

    def placed(name: str, source: Source) -> Tensor:
        if device.type != "meta":  # which reads nothing
            check_finite(name, source)
        if isinstance(source, Tensor):
            return source.to(device=device, dtype=dtype)
        target = torch.empty(shape_of(source), device=device, dtype=dtype)
        read_into(target, source)
        return target

    return {name: placed(name, source) for name, source in sources.items()}
