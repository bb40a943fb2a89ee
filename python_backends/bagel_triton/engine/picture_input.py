"""Encoded pictures from outside: opened warily, then resized for the two encoders."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from PIL import Image, ImageOps, UnidentifiedImageError

from bagel_triton.defaults import MAX_INPUT_PICTURES, MAX_PICTURE_BYTES, Modality
from bagel_triton.errors import InvalidRequest
from bagel_triton.excerpt import shortened, shown
from bagel_triton.messages import Segment, VaeSegment, VitSegment
from bagel_triton.model.resize import VAE_RULE, VIT_RULE, flattened, to_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 * 2**20


def open_picture(data: bytes, param: str) -> Image.Image:
    """The picture in ``data``: first frame, upright, RGB, transparency on white.

    Raises:
        InvalidRequest: too many bytes or pixels, not a picture, an unknown format, damaged.
    """
    if len(data) > MAX_PICTURE_BYTES:
        raise InvalidRequest(f"{param} has {len(data)} bytes; allowed: at most {MAX_PICTURE_BYTES}", param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise InvalidRequest(
                    f"{param} has {picture.width}x{picture.height} pixels; allowed: at most {MAX_PIXELS} in all", param
                )
            upright = ImageOps.exif_transpose(picture)
            return flattened(upright)
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            f"{param}={shown(data)} is not a picture; allowed: one in {', '.join(FORMATS)} format", param
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"{param} is damaged: {shortened(str(error))}", param) from error


def picture_segments(
    encoded: Sequence[bytes], wanted: Modality, max_side: int
) -> tuple[list[tuple[Segment, ...]], tuple[int, int] | None]:
    """Each picture's segments, and the last one's (height, width) as an output size.

    A picture for editing enters twice, for generation and for understanding; the ViT sees
    the picture as it was resized for the autoencoder.

    Raises:
        InvalidRequest: too many pictures, or one that cannot be used.
    """
    if len(encoded) > MAX_INPUT_PICTURES:
        raise InvalidRequest.value("image", f"{len(encoded)} pictures", f"at most {MAX_INPUT_PICTURES}")
    segments: list[tuple[Segment, ...]] = []
    size = None
    for index, data in enumerate(encoded):
        vae = VAE_RULE.apply(open_picture(data, f"image[{index}]"))
        vit = VIT_RULE.apply(vae)
        understood = VitSegment(vit.height, vit.width, to_bytes(vit))
        if wanted == "text":
            segments.append((understood,))
            continue
        if max(vae.size) > max_side:
            raise InvalidRequest(
                f"image[{index}] is {vae.width}x{vae.height} pixels once resized; "
                f"this checkpoint's position table allows sides up to {max_side}",
                f"image[{index}]",
            )
        segments.append((VaeSegment(vae.height, vae.width, to_bytes(vae)), understood))
        size = (vae.height, vae.width)
    return segments, size
