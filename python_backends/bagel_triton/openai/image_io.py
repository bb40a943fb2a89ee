"""The images of requests, from the URLs that name them, and those of replies, as files and short-lived URLs."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import secrets
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bagel_triton.openai.image_fetch import SCHEMES, FetchError, RemoteImages, without_login
from bagel_triton.protocol.errors import MAX_SHOWN, InvalidRequest, format_value, truncate

Format = Literal["png", "jpeg", "webp"]
FULL_QUALITY = 100
_FINE = 90  # from this quality on, a JPEG keeps its colours at full resolution
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class ImageUrl:
    """The URL of an image, and ``param``, its field of the body."""

    url: str
    param: str


@dataclass(frozen=True)
class ImageUpload:
    """An encoded image that came in the body itself, in the field ``param``."""

    data: bytes
    param: str


class ImageLoader:
    """Loads encoded images: ``data:`` URLs, and remote ones unless ``remote`` is None.

    Nothing of this machine is ever read.
    """

    def __init__(self, remote: RemoteImages | None, attachments: Mapping[str, bytes] | None = None) -> None:
        self._remote, self._attachments = remote, attachments or {}

    def holding(self, attachments: Mapping[str, bytes]) -> ImageLoader:
        """The same loader for a request whose large images were taken out of its body, by name."""
        return ImageLoader(self._remote, attachments) if attachments else self

    async def load(self, images: Sequence[ImageUrl | ImageUpload]) -> tuple[bytes, ...]:
        """The encoded bytes of each image, in order.

        Raises:
            InvalidRequest: one cannot be had; names its field and the cause.
        """
        loads = [asyncio.ensure_future(self._load(image)) for image in images]
        try:
            return tuple(await asyncio.gather(*loads))
        finally:
            for load in loads:
                load.cancel()

    async def _load(self, image: ImageUrl | ImageUpload) -> bytes:
        if isinstance(image, ImageUpload):
            return image.data
        url = image.url.strip()
        scheme, colon, rest = url.partition(":")
        if colon and scheme.lower() == "data":
            attached = self._attachments.get(rest.rpartition(",")[2])
            return _decode(rest, image.param) if attached is None else attached
        if not colon or scheme.lower() not in SCHEMES:
            allowed = "a data: URL" if self._remote is None else "a data:, http: or https: URL"
            raise InvalidRequest.value(image.param, url, allowed)
        if self._remote is None:
            raise InvalidRequest(
                f"{image.param}={format_value(without_login(url))} is a remote image, and this server fetches none; "
                "allowed: a data: URL",
                image.param,
            )
        try:
            return await self._remote.fetch(url)
        except FetchError as error:
            shown = format_value(without_login(url))
            raise InvalidRequest(
                f"{image.param}={shown} cannot be fetched: {truncate(str(error))}", image.param
            ) from error


def _decode(rest: str, param: str) -> bytes:
    """The bytes in ``rest`` of a ``data:`` URL, after its scheme."""
    head, comma, data = rest.partition(",")
    if not comma or "base64" not in [word.strip().lower() for word in head.split(";")[1:]]:
        raise InvalidRequest.value(param, f"data:{rest[:MAX_SHOWN]}", "data:<media type>;base64,<data>")
    try:
        decoded = base64.b64decode(_canonical(urllib.parse.unquote_to_bytes(data)), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise InvalidRequest(
            f"{param}={format_value(f'data:{rest}')} holds malformed base64: {error}", param
        ) from error
    if not decoded:
        raise InvalidRequest(f"{param}={format_value(f'data:{rest}')} holds no data", param)
    return decoded


def _canonical(encoded: bytes) -> bytes:
    """``encoded`` in the standard alphabet, padded, on one line.

    Line breaks mean nothing. A form encoder turns ``+`` into a blank, and to leave that out
    would give other bytes, so blanks are accepted only between pieces of equal length.

    Raises:
        ValueError: it is not base64 of either alphabet.
    """
    lines = re.sub(rb"\s*[\r\n\f\v]\s*", b"", encoded).split()
    if len(lines) > 1:
        width = len(lines[0])
        if any(len(line) != width for line in lines[1:-1]) or len(lines[-1]) > width or width % 4:
            raise ValueError("blanks between characters that are no line breaks; was a + lost in a form?")
    joined = b"".join(lines)
    if b"-" in joined or b"_" in joined:
        if b"+" in joined or b"/" in joined:
            raise ValueError("characters of both the standard and the URL-safe alphabet")
        joined = joined.translate(_FROM_URL_SAFE)
    digits = joined.rstrip(b"=")
    if len(joined) - len(digits) > 2 or len(digits) % 4 == 1 or (len(lines) > 1 and len(joined) % 4):
        raise ValueError("wrong padding, or characters are missing")
    return digits + b"=" * (-len(digits) % 4)


async def encode(pixels: NDArray[np.uint8], file_format: Format = "png", quality: int = FULL_QUALITY) -> bytes:
    """``pixels`` [H, W, 3] as a file; in a thread, as a large PNG takes hundreds of milliseconds.

    ``quality`` is 0 to 100, for JPEG and WebP; a PNG is lossless.
    """
    return await asyncio.to_thread(_encode, pixels, file_format, quality)


async def encode_base64(pixels: NDArray[np.uint8], file_format: Format = "png", quality: int = FULL_QUALITY) -> str:
    """The same file in base64."""
    return await asyncio.to_thread(lambda: base64.b64encode(_encode(pixels, file_format, quality)).decode())


async def data_url(pixels: NDArray[np.uint8]) -> str:
    """``pixels`` [H, W, 3] as a PNG in a ``data:`` URL."""
    return f"data:image/png;base64,{await encode_base64(pixels)}"


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
