"""The host's memory that is free, within the limits of a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes of memory that this process may still allocate, within the limits of its cgroups."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_headrooms(proc, cgroups)])


def _headrooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """Bytes left under each cgroup limit of this process; page cache that can be dropped counts as left."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit_file, usage_file = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container sees its own group at the root, not at this path.
        own = root / path.lstrip("/")
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            if not (folder / limit_file).is_file() or (limit := (folder / limit_file).read_text().strip()) == "max":
                continue
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            yield max(0, int(limit) - int((folder / usage_file).read_text()) + cached)
