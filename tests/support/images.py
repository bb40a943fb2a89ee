"""Encoded images to send."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def png(height: int, width: int, seed: int) -> bytes:
    """A PNG of noise; another seed, another image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
