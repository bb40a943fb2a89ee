"""libpython, which Triton's Python stub loads and which not every Python brings."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bagel_triton.runtime.command_error import CommandError

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
NAME = f"libpython{VERSION}.so.1.0"


def find() -> Path:
    """The shared library of this interpreter's version; the interpreter's own where it has one.

    Raises:
        CommandError: there is none; names the package that brings it.
    """
    for directory in _directories():
        if (directory / NAME).is_file():
            return directory / NAME
    raise CommandError(
        f"{NAME} is not on this machine, and tritonserver's Python backend needs it: "
        f"install the package libpython{VERSION} (Debian, Ubuntu) or use a Python built with --enable-shared"
    )


def _directories() -> Iterator[Path]:
    for variable in ("LIBDIR", "LIBPL"):
        if value := sysconfig.get_config_var(variable):
            yield Path(value)
    yield Path(sys.base_prefix) / "lib"
    yield from _loader_directories()


def _loader_directories() -> Iterator[Path]:
    """Folders in which the system's loader has a library of this name."""
    ldconfig = shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin:/usr/sbin")
    if ldconfig is None:
        return
    cache = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout
    for line in cache.splitlines():  # "	libz.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libz.so.1"
        name, _, path = line.strip().partition(" => ")
        if name.startswith(f"{NAME} "):
            yield Path(path).parent
