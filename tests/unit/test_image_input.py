"""Encoded images of every depth, as the model is shown them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bagel_triton.engine.preprocess.image_input import open_image
from bagel_triton.protocol.errors import InvalidRequest

GREY, RGB, GREY_ALPHA = 0, 2, 4  # colour types of PNG
GREYS = np.array([[0, 1, 255, 256, 32768, 33000, 65535]], ">u2")


def png(pixels: np.ndarray, colour_type: int, transparent: bytes = b"") -> bytes:
    """A 16-bit PNG of ``pixels`` [height, width, ...]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def shown(data: bytes) -> list[list[int]]:
    """The colours of the first row."""
    return np.asarray(open_image(data, "image[0]"))[0].tolist()


def test_16_bits_of_grey_become_8() -> None:
    assert shown(png(GREYS, GREY)) == [[value] * 3 for value in (0, 0, 1, 1, 128, 128, 255)]


def test_one_grey_of_16_bits_may_be_transparent() -> None:
    assert [red for red, _, _ in shown(png(GREYS, GREY, struct.pack(">H", 32768)))] == [
        0,
        0,
        1,
        1,
        255,
        128,
        255,
    ]


def test_16_bits_of_colour_become_8_and_one_colour_may_be_transparent() -> None:
    colours = np.array([[[0x1234, 0, 0], [0x3412, 0, 0xFFFF]]], ">u2")
    assert shown(png(colours, RGB)) == [[0x12, 0, 0], [0x34, 0, 255]]
    assert shown(png(colours, RGB, struct.pack(">HHH", 0x1234, 0, 0))) == [[255, 255, 255], [0x34, 0, 255]]


def test_16_bits_of_alpha_are_put_on_white() -> None:
    greys = np.array([[[0x1200, 0xFFFF], [0, 0]]], ">u2")
    assert shown(png(greys, GREY_ALPHA)) == [[0x12] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_ordinary_depths_are_as_pil_shows_them(mode: str) -> None:
    image = Image.linear_gradient("L").resize((5, 9)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert open_image(buffer.getvalue(), "image[0]").tobytes() == image.convert("RGB").tobytes()


def test_what_is_no_image_is_shown() -> None:
    with pytest.raises(
        InvalidRequest, match=r"^image\[2\]='<html>.*\.\.\. is not an image; allowed: one in PNG, JPEG, "
    ):
        open_image(b"<html>" * 1000, "image[2]")
