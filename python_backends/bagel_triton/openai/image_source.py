"""The images of a request, from the URLs that name them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bagel_triton.openai.image_fetch import SCHEMES, FetchError, RemoteImages
from bagel_triton.protocol.errors import InvalidRequest, format_value, truncate

_WHITESPACE = b" \t\r\n\f"


@dataclass(frozen=True)
class ImageUrl:
    """Where an image is, and ``param``, the field of the body that says so."""

    url: str
    param: str


class ImageLoader:
    """Loads encoded images: ``data:`` URLs, and remote ones unless ``remote`` is None.

    Nothing of this machine is ever read.
    """

    def __init__(self, remote: RemoteImages | None) -> None:
        self._remote = remote

    async def load(self, images: Sequence[ImageUrl]) -> tuple[bytes, ...]:
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

    async def _load(self, image: ImageUrl) -> bytes:
        scheme, colon, rest = image.url.partition(":")
        if colon and scheme.lower() == "data":
            return _decode(rest, image.param)
        if not colon or scheme.lower() not in SCHEMES:
            allowed = "a data: URL" if self._remote is None else "a data:, http: or https: URL"
            raise InvalidRequest.value(image.param, image.url, allowed)
        if self._remote is None:
            raise InvalidRequest(
                f"{image.param}={format_value(image.url)} is a remote image, and this server fetches none; "
                "allowed: a data: URL",
                image.param,
            )
        try:
            return await self._remote.fetch(image.url)
        except FetchError as error:
            raise InvalidRequest(
                f"{image.param}={format_value(image.url)} cannot be fetched: {truncate(str(error))}", image.param
            ) from error


def _decode(rest: str, param: str) -> bytes:
    """The bytes in ``rest`` of a ``data:`` URL, after its scheme."""
    head, comma, data = rest.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest.value(param, f"data:{rest}", "data:<media type>;base64,<data>")
    try:
        encoded = urllib.parse.unquote_to_bytes(data).translate(None, _WHITESPACE)
        decoded = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise InvalidRequest(
            f"{param}={format_value(f'data:{rest}')} holds malformed base64: {error}", param
        ) from error
    if not decoded:
        raise InvalidRequest(f"{param}={format_value(f'data:{rest}')} holds no data", param)
    return decoded


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of ``pixels`` [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(pixels: NDArray[np.uint8]) -> str:
    """``pixels`` [H, W, 3] as a PNG in a ``data:`` URL."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
