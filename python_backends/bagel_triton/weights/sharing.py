"""One copy of the weights for all stages of a server on a device.

A CPU computes in float32 and the published weights are bfloat16, so each stage would convert its own copy; they map
one from shared memory. Weights that are stored in the wanted dtype need none of this: the pages of the checkpoint's
file are shared already. On a GPU the processes map one allocation.

Nothing writes to weights once they are loaded: parameters need no gradients, and no engine changes one. On a CPU the
mapping is read-only; a GPU may not support that, see :mod:`~bagel_triton.ipc.cuda_memory`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bagel_triton.ipc.cuda_memory import NotShareable
from bagel_triton.ipc.shared_descriptor import SharedDescriptor
from bagel_triton.ipc.shm import SHM_DIRECTORY, open_locked, reserve
from bagel_triton.weights.files import FileIdentity, drop_pages, map_read_only
from bagel_triton.weights.layout import Layout, Source, as_stored, check_finite, read_into, stored_of, tensors_of

ALIGNMENT = 64  # that of torch's own allocations; the rounding of a matrix product may depend on it
log = logging.getLogger(__name__)


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

    def free(self) -> None:
        """Free what no process uses any more, after :meth:`close`; it is read from the checkpoint when needed."""


def shared_weights(prefix: str, device: torch.device) -> SharedWeights:
    """The weights of the server with ``prefix`` on ``device``; nothing is opened until weights are loaded."""
    if device.type == "cpu":
        return WeightStore(prefix)
    from bagel_triton.ipc.cuda_memory import CudaMemory

    return DeviceWeights(prefix, CudaMemory(device))


class WeightStore:
    """The weights of one server's stages on the CPU, in files named ``PREFIX_weights_KEY``.

    Contents: the key is a digest of the checkpoint's files (path, size, time of change), the
    tensors and the dtype. Another state of the checkpoint has another file.

    Processes: the first one writes a file under the lock of ``..._writing``; the others wait for
    it. The file gets its name when it is complete. If the writer dies, the next one starts over.

    Lifetime: a mapping lasts as long as any of its tensors, even if the file is removed, and
    holds a shared lock. Files stay for stages that start later, until the prefix is swept. Before
    a new file is written, unlocked ones of the prefix are removed.

    Access: tensors are mapped read-only. Writing to one ends the process (SIGSEGV) and changes
    nothing in others. Threads: any.

    Raises:
        MemoryError: shared memory has no room for the weights.
        OSError: a file of this prefix cannot be opened, for example another user's.
    """

    def __init__(self, prefix: str, directory: Path = SHM_DIRECTORY) -> None:
        self._prefix, self._directory = prefix, directory

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def converted(
        self, sources: Mapping[str, Source], dtype: torch.dtype, files: tuple[FileIdentity, ...]
    ) -> dict[str, Tensor]:
        """``sources`` in ``dtype``, by name, on the CPU.

        Sources come from ``files`` and are read only if no process has written them yet. A source
        that is stored as it is wanted is returned as it is, mapped from its file.
        """
        mapped: dict[str, Tensor] = {}
        written: dict[str, Source] = {}
        for name, source in sources.items():
            if (stored := as_stored(name, source, dtype)) is None:
                written[name] = source
            else:
                check_finite(name, source)
                mapped |= stored
        if not written:
            return mapped
        layout = Layout.of(written, dtype, ALIGNMENT)
        path = self._directory / f"{self._prefix}_weights_{layout.key(files, 'cpu')}"
        while (descriptor := _open_shared(path)) is None:
            self._write(path, layout, sources)
        try:
            return mapped | layout.views(map_read_only(descriptor))
        finally:
            os.close(descriptor)  # the mapping has its own duplicate, which keeps the lock

    def close(self) -> None:
        """Do nothing: the files stay for stages that start later."""

    def free(self) -> None:
        """Remove files that no process maps."""
        for path in self._directory.glob(f"{self._prefix}_weights_*"):
            try:
                descriptor = open_locked(path)
            except (FileNotFoundError, PermissionError):  # removed by another process, or another user's
                continue
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def _write(self, path: Path, layout: Layout, sources: Mapping[str, Source]) -> None:
        """Write the file at ``path``, or wait until another process has."""
        lock = path.with_name(f"{path.name}_writing")
        descriptor = open_locked(lock, create=True, wait=True)
        if descriptor is None:  # the process that was waited for has finished, or given up
            return
        try:
            if not path.exists():
                self.free()
                _create(path, layout, sources)
        finally:
            lock.unlink()
            os.close(descriptor)


def _open_shared(path: Path) -> int | None:
    """A descriptor of ``path`` that keeps it from being removed as unused; None where there is no such file."""
    try:
        return open_locked(path, shared=True, wait=True)
    except FileNotFoundError:
        return None


def _create(path: Path, layout: Layout, sources: Mapping[str, Source]) -> None:
    started = time.perf_counter()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Without a name until it is complete: if this process dies, the kernel frees the memory.
        descriptor = os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            reserve(descriptor, layout.size, "weights")
            unnamed = f"/proc/self/fd/{descriptor}"
            contents = torch.from_file(unnamed, shared=True, size=layout.size, dtype=torch.uint8)
            layout.fill(contents, sources)
            # os.link follows the link in /proc only if it is given a directory's descriptor.
            os.link(unnamed, path.name, dst_dir_fd=directory)
        finally:
            os.close(descriptor)
    finally:
        os.close(directory)
    log.info("wrote %d bytes of weights in %.1f s: %s", layout.size, time.perf_counter() - started, path.name)


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

    def free(self) -> None:
        """Do nothing: the memory ends with its last tensor."""

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

    placed: dict[str, Tensor] = {}
    for name, source in sources.items():
        if device.type != "meta":  # which reads nothing
            check_finite(name, source)
        if isinstance(source, Tensor):
            placed[name] = source.to(device=device, dtype=dtype)
            if placed[name] is not source:
                drop_pages([source])
            continue
        targets = {
            tensor: torch.empty(shape, device=device, dtype=kind)
            for tensor, (shape, kind) in tensors_of(name, source, dtype).items()
        }
        if device.type != "meta":
            read_into([*targets.values()], source)
            drop_pages(stored_of(source))
        placed |= targets
    return placed
