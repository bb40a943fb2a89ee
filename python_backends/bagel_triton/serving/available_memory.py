"""What memory this machine has left: its own, a cgroup's, the shared folder's, a CUDA device's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_triton.ipc.shm import SHM_DIRECTORY

# Heavy modules are imported where they are used: --help must not wait for torch.
if TYPE_CHECKING:
    import torch

    from bagel_triton.model.device import Placement
    from bagel_triton.serving.memory_plan import Available

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def read(placement: Placement) -> Available:
    """What is free for stages at ``placement``."""
    from bagel_triton.serving.memory_plan import Available

    shared = os.statvfs(SHM_DIRECTORY)
    free = host(), shared.f_bavail * shared.f_frsize
    if placement.torch_device.type == "cpu":
        return Available(*free)
    return Available(*free, *_on_device(placement.torch_device))


def host(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes of memory that this process may still take: the machine's, within the limits of its cgroups."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_headrooms(proc, cgroups)])


def _headrooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """For every limit on this process, how much is left under it; caches that can be dropped count as left."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit_file, usage_file = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container sees its own group at the root, whatever the path says.
        own = root / path.lstrip("/")
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            if not (folder / limit_file).is_file() or (limit := (folder / limit_file).read_text().strip()) == "max":
                continue
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            yield max(0, int(limit) - int((folder / usage_file).read_text()) + cached)


def _on_device(device: torch.device) -> tuple[int, str | None]:
    """Free bytes of a CUDA device and why its weights cannot be shared, if they cannot.

    Asked in a process of its own: asking takes memory there until its end.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_ask_device, device).result()
        except BrokenProcessPool as error:  # a driver that crashes, or too little memory to start with
            raise ValueError(f"device={str(device)!r} does not answer: the process that asked it died") from error


def _ask_device(device: torch.device) -> tuple[int, str | None]:
    import torch

    from bagel_triton.ipc.cuda_memory import why_not

    try:
        return torch.cuda.mem_get_info(device)[0], why_not(device)
    except RuntimeError as error:  # a GPU that is full, or gone
        raise ValueError(f"device={str(device)!r} does not answer: {str(error).splitlines()[0]}") from error
