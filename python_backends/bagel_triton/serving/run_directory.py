"""The private folder of a running server, among the machine's temporary ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bagel_triton.serving.command_error import CommandError

VARIABLE = "TMPDIR"
LOG_FILE = "tritonserver.log"
ROOM = 4 * 1024 * 1024  # bytes: the stub, the configuration, and a log that can say why a start failed


@contextlib.contextmanager
def created() -> Iterator[Path]:
    """An empty folder with :data:`ROOM`, removed at the end unless an error leaves a log to be read.

    Raises:
        CommandError: there can be none; names the folder that would have held it.
    """
    path, keep = _make(), False
    try:
        _try_room(path)
        yield path
    except Exception:
        keep = (path / LOG_FILE).exists()
        raise
    finally:
        if not keep:
            shutil.rmtree(path)


def _make() -> Path:
    # Python goes on with another folder where the variable names one that cannot be used.
    parent = os.environ.get(VARIABLE)
    try:
        return Path(tempfile.mkdtemp(prefix="bagel_triton_", dir=parent or tempfile.gettempdir())).absolute()
    except OSError as error:
        raise _unusable(parent, error) from error


def _try_room(path: Path) -> None:
    """Reserve the room and give it back: unlike a count of free bytes, this heeds quotas too."""
    try:
        with (path / "room").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
        (path / "room").unlink()
    except OSError as error:
        raise _unusable(str(path.parent), error) from error


def _unusable(parent: str | None, error: OSError) -> CommandError:
    where = f"{VARIABLE}={parent}" if parent else "the folder for temporary files"
    return CommandError(
        f"{where} cannot be used: {error.strerror}; "
        f"{VARIABLE} must name a folder that can be written, with {ROOM >> 20} MiB free"
    )
