"""One copy of converted weights for all processes of a server, mapped from shared memory.

A CPU computes in float32 and the published weights are bfloat16, so every stage would hold
a conversion of its own. Weights stored in the wanted dtype need no copy here: the mapped
pages of the checkpoint's own file are shared already. :mod:`~bagel_triton.weights.device`
has the same for a GPU.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bagel_triton.ipc.shm import SHM_DIRECTORY, reserve
from bagel_triton.weights.files import FileIdentity
from bagel_triton.weights.layout import Layout, Source

ALIGNMENT = 64  # as torch's own allocations are: the rounding of a matrix product may depend on it
log = logging.getLogger(__name__)


class WeightStore:
    """The weights of one server's stages on the CPU; converted ones are in files named ``PREFIX_weights_KEY``.

    Contents: the key stands for the checkpoint's files (path, size, time of change), the
    tensors and the dtype, so two states of a checkpoint never meet in one file.

    Processes: the first that asks for weights converts them, under the lock of a file named
    ``..._writing``; others that ask meanwhile wait for it. The weights get their name when
    all are written. If the writer dies, the next in line starts over.

    Lifetime: a mapping lasts as long as any tensor of it, whatever becomes of the file or
    of the process that wrote it, and holds a shared lock on the file. Files stay for
    stages that start later, until whoever owns the prefix sweeps it; a file of the prefix
    that is not locked and not the one wanted is removed when a new one is written.

    Access: tensors are mapped read-only; writing to one ends the process (SIGSEGV) rather
    than change what others compute. Threads: any.

    Raises:
        MemoryError: shared memory has no room for the weights.
        OSError: a file of this prefix cannot be opened, as when it is another user's.
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

        ``files`` are those that the sources were read from; sources are read only if no
        process has converted them yet. One that has the dtype is returned as it is: it
        stays mapped from its file.
        """
        as_stored = {
            name: source for name, source in sources.items() if isinstance(source, Tensor) and source.dtype == dtype
        }
        other = {name: source for name, source in sources.items() if name not in as_stored}
        if not other:
            return as_stored
        layout = Layout.of(other, dtype, ALIGNMENT)
        key = layout.key(files, "cpu")
        path = self._directory / f"{self._prefix}_weights_{key}"
        while (descriptor := _open_shared(path)) is None:
            self._write(path, layout, sources)
        try:
            return as_stored | layout.views(map_read_only(descriptor))
        finally:
            os.close(descriptor)  # the mapping has its own duplicate, and with it the lock

    def close(self) -> None:
        """Nothing ends: the files stay for stages that start later."""

    def _write(self, path: Path, layout: Layout, sources: Mapping[str, Source]) -> None:
        """Make the file at ``path``, or wait for the process that is making it."""
        turn = path.with_name(f"{path.name}_writing")
        descriptor = os.open(turn, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, turn):  # the process waited for has finished, or given up
                return
            try:
                if not path.exists():
                    self._remove_unused()
                    _create(path, layout, sources)
            finally:
                turn.unlink()
        finally:
            os.close(descriptor)

    def _remove_unused(self) -> None:
        for path in self._directory.glob(f"{self._prefix}_weights_*"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):  # another process was quicker, or another user's
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:  # in use
                pass
            finally:
                os.close(descriptor)


def _open_shared(path: Path) -> int | None:
    """A descriptor of ``path`` that keeps it from being removed as unused; None where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _create(path: Path, layout: Layout, sources: Mapping[str, Source]) -> None:
    started = time.perf_counter()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Without a name until it is whole: if this process dies, the kernel takes the memory back.
        descriptor = os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        try:
            reserve(descriptor, layout.size, "weights")
            unnamed = f"/proc/self/fd/{descriptor}"
            contents = torch.from_file(unnamed, shared=True, size=layout.size, dtype=torch.uint8)
            layout.fill(contents, sources)
            # Only with a directory's descriptor does os.link follow the link in /proc.
            os.link(unnamed, path.name, dst_dir_fd=directory)
        finally:
            os.close(descriptor)
    finally:
        os.close(directory)
    log.info("converted %d bytes of weights in %.1f s: %s", layout.size, time.perf_counter() - started, path.name)


def map_read_only(descriptor: int) -> Tensor:
    """The open file's bytes, read-only: uint8 [size]."""
    mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # as it shall be
        return torch.frombuffer(mapping, dtype=torch.uint8)
