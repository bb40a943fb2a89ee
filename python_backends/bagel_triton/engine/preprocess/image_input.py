"""Encoded images from outside: opened warily, then resized for the two encoders."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

from PIL import Image, ImageOps, UnidentifiedImageError

from bagel_triton.model.image import VAE_RULE, VIT_RULE, flattened, to_bytes
from bagel_triton.protocol.errors import InvalidRequest, format_value, truncate
from bagel_triton.protocol.messages import Segment, VaeSegment, VitSegment
from bagel_triton.protocol.request import MAX_INPUT_IMAGES, Modality
from bagel_triton.protocol.validation import MAX_IMAGE_BYTES

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 * 2**20


def open_image(data: bytes, param: str) -> Image.Image:
    """The image in ``data``: first frame, upright, RGB, transparency on white.

    Raises:
        InvalidRequest: too many bytes or pixels, not an image, an unknown format, damaged.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidRequest(f"{param} has {len(data)} bytes; allowed: at most {MAX_IMAGE_BYTES}", param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRequest(
                    f"{param} has {image.width}x{image.height} pixels; allowed: at most {MAX_PIXELS} in all", param
                )
            upright = ImageOps.exif_transpose(image)
            return flattened(upright)
    except UnidentifiedImageError as error:
        raise InvalidRequest(
            f"{param}={format_value(data)} is not an image; allowed: one in {', '.join(FORMATS)} format", param
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"{param} is damaged: {truncate(str(error))}", param) from error


def image_segments(
    encoded: Sequence[bytes], wanted: Modality, max_side: int
) -> tuple[list[tuple[Segment, ...]], tuple[int, int] | None]:
    """Each image's segments, and the last one's (height, width) as an output size.

    An image for editing enters twice, for generation and for understanding; the ViT sees
    the image as it was resized for the autoencoder.

    Raises:
        InvalidRequest: too many images, or one that cannot be used.
    """
    if len(encoded) > MAX_INPUT_IMAGES:
        raise InvalidRequest.value("image", f"{len(encoded)} images", f"at most {MAX_INPUT_IMAGES}")
    segments: list[tuple[Segment, ...]] = []
    size = None
    for index, data in enumerate(encoded):
        vae = VAE_RULE.apply(open_image(data, f"image[{index}]"))
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
