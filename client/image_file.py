"""Where the Triton clients put an image."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def unwritable(output: Path) -> str | None:
    """Why no image can be written there, as far as can be told before there is one."""
    if not output.parent.is_dir():
        return f"cannot write {output}: {output.parent} is not a folder"
    if output.suffix.lower() not in Image.registered_extensions():
        return f"cannot write {output}: its name has no ending of an image, such as .png"
    return None


def save(pixels: NDArray[np.uint8], seed: int, output: Path) -> int:
    """Write the image and say where; the exit status."""
    try:
        Image.fromarray(pixels).save(output)
    except (OSError, ValueError) as error:  # ValueError: a format that cannot be written
        return fail(f"cannot write {output}: {getattr(error, 'strerror', None) or error}")
    print(f"image  {output}, {pixels.shape[1]}x{pixels.shape[0]} pixels, seed {seed}")
    return 0


def fail(message: str) -> int:
    """Say why there is nothing to show; the exit status."""
    print(message, file=sys.stderr)
    return 1
