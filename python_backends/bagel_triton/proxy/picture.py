"""Pictures in the form a reply carries them."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of ``pixels`` [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(pixels: NDArray[np.uint8]) -> str:
    """``pixels`` [H, W, 3] as a PNG in a ``data:`` URL."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
