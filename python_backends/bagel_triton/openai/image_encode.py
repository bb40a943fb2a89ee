"""Image files of generated pixels, and the short-lived URLs at which they can be fetched."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import time
from collections import OrderedDict
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Format = Literal["png", "jpeg", "webp"]
FULL_QUALITY = 100
_FINE = 90  # from this quality on, a JPEG keeps its colours at full resolution


async def encode(pixels: NDArray[np.uint8], file_format: Format = "png", quality: int = FULL_QUALITY) -> bytes:
    """``pixels`` [H, W, 3] as a file; in a thread, as a large PNG takes hundreds of milliseconds.

    ``quality`` is 0 to 100, for JPEG and WebP; a PNG is lossless.
    """
    return await asyncio.to_thread(_encode, pixels, file_format, quality)


async def encode_base64(pixels: NDArray[np.uint8], file_format: Format = "png", quality: int = FULL_QUALITY) -> str:
    """The same file in base64."""
    return await asyncio.to_thread(lambda: base64.b64encode(_encode(pixels, file_format, quality)).decode())


def _encode(pixels: NDArray[np.uint8], file_format: Format, quality: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if file_format == "png":
        image.save(buffer, "PNG")
    elif file_format == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4" if quality >= _FINE else "4:2:0")
    else:
        image.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


class ImageFile(NamedTuple):
    """An encoded image."""

    data: bytes
    file_format: Format
    expires_at: float  # time.monotonic()


class ImageStore:
    """Images requested as URLs, in memory, under names that cannot be guessed.

    They are dropped after ``ttl_s`` seconds, the oldest earlier where all together would have
    more than ``max_bytes``.
    """

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes, self._ttl_s = max_bytes, ttl_s
        self._files: OrderedDict[str, ImageFile] = OrderedDict()
        self._bytes = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of all images held now."""
        return self._bytes

    def add(self, data: bytes, file_format: Format) -> str:
        """Keep ``data``; the name to get it by."""
        self._drop_expired()
        while self._files and self._bytes + len(data) > self._max_bytes:
            self._drop_oldest()
        name = f"{secrets.token_urlsafe(24)}.{file_format}"
        self._files[name] = ImageFile(data, file_format, time.monotonic() + self._ttl_s)
        self._bytes += len(data)
        return name

    def get(self, name: str) -> ImageFile | None:
        """The image of that name; None if it was dropped or never there."""
        self._drop_expired()
        return self._files.get(name)

    def _drop_expired(self) -> None:
        now = time.monotonic()
        while self._files and next(iter(self._files.values())).expires_at <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self._bytes -= len(file.data)
