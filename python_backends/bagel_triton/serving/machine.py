"""A server's share of this machine: TCP ports, a folder of its own, and the files of the package."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import bagel_triton
from bagel_triton.serving import CommandError

# --- the GPU ---


def gpu_sharing(environ: Mapping[str, str] = os.environ) -> str:
    """How processes share a GPU: by NVIDIA's MPS, whose daemon has a pipe, or by turns."""
    if (Path(environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists():
        return "MPS"
    return "time slices (nvidia-cuda-mps-control -d before serve lets stages compute at the same time)"


# --- the TCP ports that tritonserver will bind ---

LOOPBACK = "127.0.0.1"


def check_port(flag: str, port: int) -> None:
    """Raise :class:`CommandError` where ``port`` cannot be one; names ``flag``."""
    if not 0 <= port <= 65535:
        raise CommandError(f"{flag}={port} is not allowed; allowed: 0 (a free port) to 65535")


def listen(host: str, port: int, flag: str) -> socket.socket:
    """A listening socket on ``host``; ``port`` 0 means any free one.

    Raises:
        CommandError: the port is busy or the address cannot be used; names ``flag``.
    """
    check_port(flag, port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CommandError(f"cannot listen on {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise CommandError(
            f"cannot listen on {host} port {port}: {error.strerror}; {flag} chooses another, 0 a free one"
        ) from error
    return listener


def free_port(host: str, wanted: int) -> int:
    """``wanted`` if it is a free port of ``host``, else any that is.

    Raises:
        CommandError: the address cannot be used.
    """
    for port in (wanted, 0):
        try:
            with listen(host, port, "--triton-grpc-port") as listener:
                return int(listener.getsockname()[1])
        except CommandError:
            if port == 0:
                raise
    raise AssertionError("the last one returns or raises")


def choose_ports(wanted: Mapping[str, int], hosts: Mapping[str, str] | None = None) -> dict[str, int]:
    """A free port for each flag in ``wanted``, whose value is a port or 0 for any.

    They are ports of the loopback address, or of the one that ``hosts`` gives for a flag. All are held until all are
    chosen, so they differ. They are free on return, for another process to bind.

    Raises:
        CommandError: a wanted port is busy.
    """
    with contextlib.ExitStack() as held:
        # Given ports first: a free one must not take the place of one asked for.
        ordered = sorted(wanted, key=lambda flag: wanted[flag] == 0)
        chosen = {}
        for flag in ordered:
            listener = held.enter_context(listen((hosts or {}).get(flag, LOOPBACK), wanted[flag], flag))
            chosen[flag] = int(listener.getsockname()[1])
    return {flag: chosen[flag] for flag in wanted}


# --- a folder among the machine's temporary ones, private to a running server ---

TEMPORARY = "TMPDIR"
LOG_FILE = "tritonserver.log"
ROOM = 4 * 1024 * 1024  # bytes: the stub, the configuration, and a log that can say why a start failed


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """An empty folder with :data:`ROOM` bytes free, removed at the end unless an error leaves a log to be read.

    Raises:
        CommandError: there can be none; names the folder that would have held it.
    """
    path, keep = _make_directory(), False
    try:
        _reserve(path)
        yield path
    except Exception:
        keep = (path / LOG_FILE).exists()
        raise
    finally:
        if not keep:
            shutil.rmtree(path)


def _make_directory() -> Path:
    # Python goes on with another folder where the variable names one that cannot be used.
    parent = os.environ.get(TEMPORARY)
    try:
        return Path(tempfile.mkdtemp(prefix="bagel_triton_", dir=parent or tempfile.gettempdir())).absolute()
    except OSError as error:
        raise _unusable(parent, error) from error


def _reserve(path: Path) -> None:
    """Reserve the room and give it back: a count of free bytes would not see quotas."""
    try:
        with (path / "room").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
        (path / "room").unlink()
    except OSError as error:
        raise _unusable(str(path.parent), error) from error


def _unusable(parent: str | None, error: OSError) -> CommandError:
    where = f"{TEMPORARY}={parent}" if parent else "the folder for temporary files"
    return CommandError(
        f"{where} cannot be used: {error.strerror}; "
        f"{TEMPORARY} must name a folder that can be written, with {ROOM >> 20} MiB free"
    )


# --- files outside the Python package: model_repository/, client/, build/deploy/ ---

PACKAGE = Path(bagel_triton.__file__).resolve().parent
# A wheel carries them inside the package (setup.py); an editable install uses the source tree's.
CARRIED = PACKAGE / "source_tree"


def source_file(relative: str) -> Path:
    """The path of a file or folder of the source tree, wherever this installation has it.

    Raises:
        CommandError: it has none.
    """
    for root in (CARRIED, PACKAGE.parents[1]):
        if (root / relative).exists():
            return root / relative
    raise CommandError(f"{relative} is missing from this installation of bagel-triton in {PACKAGE}; install it again")
