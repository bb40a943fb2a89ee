"""Files of the source tree that are not part of the Python package."""

from __future__ import annotations

from pathlib import Path

from bagel_triton.serving.command_error import CommandError

ROOT = Path(__file__).resolve().parents[3]


def find(relative: str, hint: str) -> Path:
    """The path of ``relative`` in the source tree this package runs from.

    Raises:
        CommandError: the package was installed without its source tree; ends with ``hint``.
    """
    path = ROOT / relative
    if not path.exists():
        raise CommandError(f"{path} does not exist; {hint}")
    return path
