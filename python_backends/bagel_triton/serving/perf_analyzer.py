"""``bagel-triton perf-analyzer``: Triton's load generator, with the libraries its wheel leaves out."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bagel_triton.serving import CommandError
from bagel_triton.serving.tritonserver import LIBRARY_PATH, library_folder

# Libraries that the program is linked to, and their files in the nvidia-pytriton package.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12.*"}


@dataclass(frozen=True)
class PerfAnalyzer:
    """The program and the environment it runs in."""

    program: Path
    environment: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments: all are the program's own."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="perf_analyzer's own")
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> int:
    """Run perf_analyzer; its exit status, or 128 + N where signal N ended it.

    Raises:
        CommandError: it is not installed.
    """
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if not arguments:  # without any, it crashes
        args.refuse("perf_analyzer needs arguments: -- -m MODEL ..., or -- --help for all of them")
    with prepare() as analyzer:
        status = subprocess.run([analyzer.program, *arguments], env=analyzer.environment, check=False).returncode
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def prepare() -> Iterator[PerfAnalyzer]:
    """The perf_analyzer of the installed tritonclient, with its libraries laid out until the context ends.

    Raises:
        CommandError: that package carries none.
    """
    packaged = importlib.metadata.files("tritonclient") or []
    program = next((Path(str(file.locate())).resolve() for file in packaged if file.name == "perf_analyzer"), None)
    if program is None or not program.is_file():
        raise CommandError("the installed tritonclient carries no perf_analyzer; its manylinux wheel does")
    with tempfile.TemporaryDirectory(prefix="bagel_triton_") as folder:
        site_packages = Path(str(importlib.metadata.distribution("tritonclient").locate_file("")))
        for name, pattern in LIBRARIES.items():
            # Where nvidia-pytriton is not installed, as in a container, the system has them.
            for library in library_folder(site_packages).glob(pattern):
                (Path(folder) / name).symlink_to(library)
        given = [os.environ[LIBRARY_PATH]] if os.environ.get(LIBRARY_PATH) else []
        yield PerfAnalyzer(program, {**os.environ, LIBRARY_PATH: os.pathsep.join([folder, *given])})
