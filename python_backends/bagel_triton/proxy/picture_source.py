"""The pictures of a request, from the URLs that name them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

from bagel_triton.errors import InvalidRequest
from bagel_triton.excerpt import shortened, shown
from bagel_triton.proxy.fetch import SCHEMES, FetchError, RemotePictures

_WHITESPACE = b" \t\r\n\f"


@dataclass(frozen=True)
class PictureUrl:
    """Where a picture is, and ``param``, the field of the body that says so."""

    url: str
    param: str


class PictureSource:
    """Loads encoded pictures: ``data:`` URLs, and remote ones unless ``remote`` is None.

    Nothing of this machine is ever read.
    """

    def __init__(self, remote: RemotePictures | None) -> None:
        self._remote = remote

    async def load(self, pictures: Sequence[PictureUrl]) -> tuple[bytes, ...]:
        """The encoded bytes of each picture, in order.

        Raises:
            InvalidRequest: one cannot be had; names its field and the cause.
        """
        loads = [asyncio.ensure_future(self._load(picture)) for picture in pictures]
        try:
            return tuple(await asyncio.gather(*loads))
        finally:
            for load in loads:
                load.cancel()

    async def _load(self, picture: PictureUrl) -> bytes:
        scheme, colon, rest = picture.url.partition(":")
        if colon and scheme.lower() == "data":
            return _decode(rest, picture.param)
        if not colon or scheme.lower() not in SCHEMES:
            allowed = "a data: URL" if self._remote is None else "a data:, http: or https: URL"
            raise InvalidRequest.value(picture.param, picture.url, allowed)
        if self._remote is None:
            raise InvalidRequest(
                f"{picture.param}={shown(picture.url)} is a remote picture, and this server fetches none; "
                "allowed: a data: URL",
                picture.param,
            )
        try:
            return await self._remote.fetch(picture.url)
        except FetchError as error:
            raise InvalidRequest(
                f"{picture.param}={shown(picture.url)} cannot be fetched: {shortened(str(error))}", picture.param
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
        raise InvalidRequest(f"{param}={shown(f'data:{rest}')} holds malformed base64: {error}", param) from error
    if not decoded:
        raise InvalidRequest(f"{param}={shown(f'data:{rest}')} holds no data", param)
    return decoded
