"""Encoded images of every depth, as the model is shown them."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from bagel_triton.engine.preprocess.image_input import ByteBudget, image_segments, is_heavy, open_image
from bagel_triton.model.image import VAE_RULE
from bagel_triton.protocol.errors import InvalidRequest
from tests.support.request_shapes import BROKEN_EXIF

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


def encoded(file_format: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (40, 30), (255, 0, 0))
BLUE = Image.new("RGB", (40, 30), (0, 0, 255))
FILES = {
    "TIFF": encoded("TIFF", RED),
    "AVIF": encoded("AVIF", RED),
    "JPEG 2000": encoded("JPEG2000", RED),
    "ICO": encoded("ICO", RED, sizes=[(40, 30)]),
    "MPO": encoded("MPO", RED, save_all=True, append_images=[BLUE]),
    "CMYK JPEG": encoded("JPEG", Image.new("CMYK", (40, 30), (0, 255, 255, 0))),
    "CMYK TIFF": encoded("TIFF", Image.new("CMYK", (40, 30), (0, 255, 255, 0))),
    "GIF of two frames": encoded("GIF", RED, save_all=True, append_images=[BLUE]),
    "PNG of two frames": encoded("PNG", RED, save_all=True, append_images=[BLUE]),
    "WebP of two frames": encoded("WEBP", RED, save_all=True, append_images=[BLUE], lossless=True),
    "broken profile": encoded("PNG", RED, icc_profile=b"no profile"),
    "profile of another kind": encoded("PNG", RED.convert("P"), icc_profile=b"\0" * 128),
}


@pytest.mark.parametrize("name", FILES)
def test_a_format_is_shown_by_its_first_frame(name: str) -> None:
    image = open_image(FILES[name], "image[0]")
    assert image.size == (40, 30)
    assert np.abs(np.asarray(image)[5, 5].astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_only_the_orientation_of_exif_matters(file_format: str, name: str) -> None:
    data = encoded(file_format, RED, exif=BROKEN_EXIF[name])
    assert open_image(data, "image[0]").size == (30, 40), "orientation 6: turned by 90 degrees"


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_an_image_is_shown_upright(file_format: str, orientation: int) -> None:
    marked = RED.copy()
    marked.paste((0, 0, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(file_format, marked, exif=exif if file_format == "TIFF" else exif.tobytes())
    marked.getexif()[0x112] = orientation
    assert open_image(data, "image[0]").tobytes() == ImageOps.exif_transpose(marked).tobytes()


def profile(
    red: tuple[float, float, float], green: tuple[float, float, float], blue: tuple[float, float, float]
) -> bytes:
    """A matrix profile of gamma 2.2 with these primaries (XYZ under D50)."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    xyz = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": (0.9642, 1.0, 0.8249)}
    tags = {name: b"XYZ \0\0\0\0" + fixed(*values) for name, values in xyz.items()}
    tags |= dict.fromkeys(
        (b"rTRC", b"gTRC", b"bTRC"), b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    )
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"wide\0" + b"\0" * 79
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    rest = struct.pack(">I", len(tags)) + table + body
    head = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + rest


# Primaries of Display P3, which many phones write.
P3 = profile((0.5151, 0.2412, -0.0011), (0.2919, 0.6922, 0.0419), (0.1572, 0.0666, 0.7841))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_converted_to_srgb(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (0, 200, 0)).convert(mode)
    shown = np.asarray(open_image(encoded("PNG", image, icc_profile=P3), "image[0]"))[0, 0].astype(int)
    plain = np.asarray(open_image(encoded("PNG", image), "image[0]"))[0, 0]
    assert shown[1] > plain[1], "P3's green is purer than sRGB's, which cannot show all of it"
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    shown = np.asarray(open_image(encoded("PNG", grey, icc_profile=P3), "image[0]"))[0, 0].astype(int)
    assert np.abs(shown - 128).max() <= 2


def test_transparency_survives_a_colour_profile() -> None:
    image = Image.new("RGBA", (4, 4), (0, 200, 0, 0))
    assert np.asarray(open_image(encoded("PNG", image, icc_profile=P3), "image[0]"))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "1"])
def test_a_huge_image_is_reduced_as_it_is_converted(mode: str) -> None:
    image = Image.linear_gradient("L").resize((5000, 4000)).convert("RGB" if mode == "P" else mode).convert(mode)
    shown = open_image(encoded("PNG", image), "image[0]")
    exact = VAE_RULE.apply(image.convert("RGB"))
    assert shown.width * shown.height <= 5000 * 4000
    resized = VAE_RULE.apply(shown)
    assert resized.size == exact.size
    assert np.abs(np.asarray(resized).astype(int) - np.asarray(exact)).max() <= 24


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (500, 19), (16, 1024), (1023, 1025)])
def test_thin_and_tiny_images_are_served(size: tuple[int, int]) -> None:
    segments, output = image_segments([encoded("PNG", Image.new("RGB", size))] * 2, "image", 1024)
    assert len(segments) == 2
    assert output is not None
    assert all(side % 16 == 0 for side in output)


def test_a_cut_file_is_damaged_and_no_codecs_error_is_a_defect_of_the_server() -> None:
    whole = encoded("JPEG", Image.effect_noise((64, 64), 90).convert("RGB"), progressive=True)
    with pytest.raises(InvalidRequest, match=r"^image\[0\] is damaged: "):
        open_image(whole[: len(whole) // 2], "image[0]")
    chance = random.Random(1)
    for data in (*FILES.values(), whole):
        for _ in range(40):
            broken = bytearray(data)
            for _ in range(chance.randint(1, 8)):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            with contextlib.suppress(InvalidRequest):
                open_image(bytes(broken), "image[0]")


def test_a_header_of_too_many_pixels_is_no_damage() -> None:
    for side in (9000, 65535):
        gif = encoded("GIF", Image.new("P", (1, 1)))
        header = gif[:6] + struct.pack("<HH", side, side) + gif[10:]
        with pytest.raises(InvalidRequest, match=r"pixels; allowed: at most 67108864 in all"):
            open_image(header, "image")


def test_decodes_wait_for_memory_but_the_largest_runs_alone() -> None:
    budget, running, most = ByteBudget(100), [0], [0]

    def decode(amount: int) -> None:
        with budget.take(amount):
            running[0] += min(amount, 100)
            most[0] = max(most[0], running[0])
            time.sleep(0.002)
            running[0] -= min(amount, 100)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(decode, [30, 40, 60, 500, 10] * 10))
    assert most[0] <= 100


def test_only_requests_with_large_images_are_heavy() -> None:
    small, bomb = encoded("PNG", RED), encoded("PNG", Image.new("P", (8192, 8192)))
    assert not is_heavy(())
    assert not is_heavy([small] * 10)
    assert not is_heavy([b"no image"])
    assert is_heavy([small, bomb])
