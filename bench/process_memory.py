"""A process's memory as the kernel counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process.

    ``pss`` is its proportional set size: a page that n processes map counts as 1/n. ``resident`` counts it whole.
    ``anonymous`` pages belong to this process alone and to no file; a page of a private mapping
    of a file becomes one when it is written.
    """

    pss: int
    anonymous: int
    resident: int = 0

    @classmethod
    def own(cls) -> Self:
        """This process's, at this moment."""
        return cls.of("self")

    @classmethod
    def of(cls, pid: int | str) -> Self:
        """That of the process ``pid``, at this moment."""
        fields = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            fields[name] = int(value.split()[0]) * 1024
        return cls(fields["Pss"], fields["Anonymous"], fields["Rss"])
