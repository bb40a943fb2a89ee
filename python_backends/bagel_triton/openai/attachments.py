"""Large images in a JSON body, taken out of it before it is parsed.

A JSON parser and a base64 decoder hold the interpreter's lock for as long as a string is long:
an image of 45 MiB stops every other request for most of a second, whatever thread it is in. Here
the body is only searched, and decoded in pieces between which other threads run; the parser
then sees a few kilobytes.
"""

from __future__ import annotations

import binascii
import io
import secrets
from collections.abc import Mapping

MIN_LENGTH = 128 * 1024  # characters of base64; shorter ones are left to the parser
_MARKER = b";base64,"
_PIECE = 512 * 1024  # characters decoded at a time, a multiple of 4


def detach(body: bytearray) -> tuple[bytes, Mapping[str, bytes]]:
    """Empty ``body``: its text with a name in the place of each large base64 text of a data URL, and the bytes by name.

    A text that is not plain base64 (URL-safe, escaped, with blanks or errors) stays where it is.
    """
    nonce = secrets.token_hex(16)  # a client must not be able to name another text
    kept: list[bytes] = []
    detached: dict[str, bytes] = {}
    copied = searched = 0
    while (at := body.find(_MARKER, searched)) >= 0:
        start = at + len(_MARKER)
        end = body.find(b'"', start)
        if end < 0:
            break
        searched = end
        if end - start < MIN_LENGTH or (data := _decode(body, start, end)) is None:
            continue
        name = f"{nonce}-{len(detached)}"
        detached[name] = data
        kept += [bytes(body[copied:start]), name.encode()]
        copied = end
    kept.append(bytes(body[copied:]))
    body.clear()  # here, and not in the thread that serves others: to free it takes a while
    return b"".join(kept), detached


def _decode(body: bytearray, start: int, end: int) -> bytes | None:
    decoded = io.BytesIO()
    with memoryview(body) as view:
        for at in range(start, end, _PIECE):
            try:
                decoded.write(binascii.a2b_base64(view[at : min(at + _PIECE, end)], strict_mode=True))
            except binascii.Error:
                return None
    return decoded.getvalue()
