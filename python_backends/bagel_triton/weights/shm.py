"""One copy of the weights for all processes of a server on a CPU, mapped from shared memory.

A CPU computes in float32 and the published weights are bfloat16, so each stage would convert
its own copy. Weights that are stored in the wanted dtype need none of this: the pages of the
checkpoint's file are shared already. :mod:`~bagel_triton.weights.device` does the same for a GPU.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bagel_triton.ipc.shm import SHM_DIRECTORY, open_locked, reserve
from bagel_triton.weights.files import FileIdentity, map_read_only
from bagel_triton.weights.layout import Layout, Source, check_finite

ALIGNMENT = 64  # that of torch's own allocations; the rounding of a matrix product may depend on it
log = logging.getLogger(__name__)


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
        that is one tensor of ``dtype`` is returned as it is, mapped from its file.
        """
        mapped = {
            name: source for name, source in sources.items() if isinstance(source, Tensor) and source.dtype == dtype
        }
        written = {name: source for name, source in sources.items() if name not in mapped}
        for name, source in mapped.items():
            check_finite(name, source)
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

    def _write(self, path: Path, layout: Layout, sources: Mapping[str, Source]) -> None:
        """Write the file at ``path``, or wait until another process has."""
        lock = path.with_name(f"{path.name}_writing")
        descriptor = open_locked(lock, create=True, wait=True)
        if descriptor is None:  # the process that was waited for has finished, or given up
            return
        try:
            if not path.exists():
                self._remove_unused()
                _create(path, layout, sources)
        finally:
            lock.unlink()
            os.close(descriptor)

    def _remove_unused(self) -> None:
        for path in self._directory.glob(f"{self._prefix}_weights_*"):
            try:
                descriptor = open_locked(path)
            except (FileNotFoundError, PermissionError):  # removed by another process, or another user's
                continue
            if descriptor is not None:
                path.unlink(missing_ok=True)
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
