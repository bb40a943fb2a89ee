"""A process's memory as the kernel counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process.

    ``pss`` is its proportional set size: a page that n processes map counts as 1/n. ``resident`` counts it whole, and
    ``peak`` is the most that was ever resident, which the kernel notes without missing a moment.
    ``anonymous`` pages belong to this process alone and to no file; a page of a private mapping
    of a file becomes one when it is written.
    """

    pss: int
    anonymous: int
    resident: int = 0
    peak: int = 0

    @classmethod
    def own(cls) -> Self:
        """This process's, at this moment."""
        return cls.of("self")

    @classmethod
    def of(cls, pid: int | str) -> Self:
        """That of the process ``pid``, at this moment."""
        fields = {}
        for file in ("smaps_rollup", "status"):
            for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
                name, _, value = line.partition(":")
                if value.endswith(" kB"):
                    fields[name] = int(value.split()[0]) * 1024
        return cls(fields["Pss"], fields["Anonymous"], fields["Rss"], fields["VmHWM"])
